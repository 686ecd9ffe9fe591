// The gradient of the writes, last chunk first: `write_backward_kernel` of ../write.py for heads and chunks of 64
// in bfloat16. Programs and sums over them as in write.cu; definitions besides those: READS.

static const int HIDDEN = SPLIT * TILE;
static const int SIZE = TILE * HIDDEN;
static const int PARTS = MOMENTUM ? 4 : 2;

// g (a B) + e (a C), rows scaled by g and e.
template <bool TB>
__device__ __forceinline__ Fragment through_steps(const char* a, const char* b, const char* c, const float (&g)[2],
                                                  const float (&e)[2]) {
    Fragment x, y;
    begin_product<false, TB, false>(x, a, b);
    if (MOMENTUM) begin_product<false, TB, false>(y, a, c);
    end_products();
    settle(x);
    scale_rows(x, g);
    if (MOMENTUM) {
        settle(y);
        scale_rows(y, e);
        add(x, y);
    }
    return x;
}
__device__ __forceinline__ void add_floats(float* base, int stride, const Fragment& x) {
    Fragment y = load_floats(base, stride);
    add(y, x);
    store_floats(base, stride, y);
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, 2) write_backward_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const float* LAST, const bf16* STATES, const bf16* STEPS,
    const bf16* HIDDENS, const bf16* ZH, const float* NORMS, const bf16* TARGETS, const float* GAMMA,
    const float* BETA, const unsigned char* RESETS, const int* OPEN, const bf16* G_STATES, const bf16* G_U1,
    const bf16* G_X2, const bf16* G_U2, float* CARRIED, bf16* AFTER, bf16* G_Z1, float* G_STEPS,
    const float* G_ANCHOR, float* G_START, long kb, long kt, long kh, long vb, long vt, long vh, int walks,
    int heads, int chunks, int tokens, int first_chunk, int span, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    char *k_tile = shared, *x_tile = k_tile + TILE_BYTES, *u_tile = x_tile + TILE_BYTES,
         *w_tile = u_tile + TILE_BYTES, *dw1_tile = w_tile + TILE_BYTES, *dw2_tile = dw1_tile + TILE_BYTES,
         *ds1_tile = dw2_tile + TILE_BYTES, *ds2_tile = ds1_tile + TILE_BYTES, *pulled_tile = ds2_tile + TILE_BYTES,
         *z2_tile = pulled_tile + TILE_BYTES;
    float *inbox = (float*)(z2_tile + TILE_BYTES), *ds2_own = inbox + TILE * TILE;
    float* norm = ds2_own + (MOMENTUM ? TILE * TILE : 0);
    Arrival parts = {(u64*)(norm + 2 * TILE), TILE * TILE * 4, 0}, steps = {parts.barrier + 1, TILE_BYTES, 0};

    int s = blockIdx.x % SPLIT, m = blockIdx.x / SPLIT, b = m / heads, h = m % heads;
    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    const bf16* target2 = TARGETS + (long)h * 2 * SIZE + SIZE + s * TILE * TILE;
    float* carried = CARRIED + (long)m * PARTS * SIZE;
    long kind = (long)walks * span * TILE * HIDDEN;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    int first = s * TILE, second = SIZE + s * TILE * TILE;
    Fragment dw1 = load_floats(carried + first, HIDDEN), dw2 = load_floats(carried + second, TILE), ds1;
    if (MOMENTUM) {
        ds1 = load_floats(carried + 2 * SIZE + first, HIDDEN);
        store_private(ds2_own, load_floats(carried + 2 * SIZE + second, TILE));
    }
    prepare(parts, steps);

    for (int n = min(first_chunk + span, chunks) - 1; n >= first_chunk; --n) {
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        const bf16* states = STATES + here * PARTS * SIZE;
        const bf16* wide = HIDDENS + here * TILE * HIDDEN + s * TILE;
        copy_pieces(x_tile, wide, HIDDEN);
        copy_pieces(u_tile, STEPS + here * TILE * TILE, TILE);
        if (!TARGET) copy_pieces(w_tile, states + second, TILE);
        Pieces keys = load_pieces(k_at + (long)n * TILE * kt, kt, tokens - n * TILE);
        Pieces weights, target;
        if (TARGET) weights = load_pieces(states + second, TILE, TILE), target = load_pieces(target2, TILE, TILE);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        {
            bf16* after = AFTER + here * PARTS * SIZE;
            Packed x = packed(dw1);
            store_tile(dw1_tile, x);
            store_global(after + first, HIDDEN, x);
            x = packed(dw2);
            store_tile(dw2_tile, x);
            store_global(after + second, TILE, x);
            if (MOMENTUM) {
                x = packed(ds1);
                store_tile(ds1_tile, x);
                store_global(after + 2 * SIZE + first, HIDDEN, x);
                x = packed(load_private(ds2_own));
                store_tile(ds2_tile, x);
                store_global(after + 2 * SIZE + second, TILE, x);
            }
        }
        store_pieces(k_tile, keys);
        if (TARGET) store_pieces(w_tile, sum_pieces(weights, target));
        Lines slopes = load_lines(wide + kind, HIDDEN), bends = load_lines(wide + 3 * kind, HIDDEN), extra;
        if (READS) extra = load_lines(G_U1 + here * TILE * HIDDEN + s * TILE, HIDDEN);
        end_copies();
        wait_copies<0>();
        tiles_ready();

        // The steps, as the state takes them and as the reads see them; u_1 = (u_2 W2^T) phi'(z_1).
        Fragment g = through_steps<false>(k_tile, dw1_tile, ds1_tile, g_end, e_end);
        if (READS) add(g, from_lines(extra));
        Packed slope = from_lines(slopes), g_z1 = times(g, from_lines(bends));
        store_tile(pulled_tile, times(g, slope));
        g = through_steps<false>(x_tile, dw2_tile, ds2_tile, g_end, e_end);
        tiles_ready();
        product<false, false, true>(g, pulled_tile, w_tile);
        push_rows(inbox, parts, s, g);
        // While the parts travel: the gradient of x_2 from its steps, and what the state passes on.
        const bf16* reads = G_STATES + here * PARTS * SIZE;
        g = through_steps<true>(u_tile, dw2_tile, ds2_tile, g_end, e_end);
        if (READS) add(g, from_lines(load_lines(G_X2 + here * TILE * HIDDEN + s * TILE, HIDDEN)));
        if (MOMENTUM) {
            combine(ds1, decay, F, dw1);
            Fragment ds2 = load_private(ds2_own);
            combine(ds2, decay, F, dw2);
            if (READS) {
                add(ds1, from_lines(load_lines(reads + 2 * SIZE + first, HIDDEN)));
                add(ds2, from_lines(load_lines(reads + 2 * SIZE + second, TILE)));
            }
            store_private(ds2_own, ds2);
        }
        combine(dw1, A, 1.f, unpacked(from_lines(load_lines(reads + first, HIDDEN))));
        combine(dw2, A, 1.f, unpacked(from_lines(load_lines(reads + second, TILE))));
        product<true, false, true>(dw2, pulled_tile, u_tile);
        await(parts);

        // u_2 from z_2, in the rows that this program owns.
#pragma unroll
        for (int r = 0; r < ROWS / 16; ++r) {
            int row = r * 16 + own, t = s * ROWS + row;
            long narrow = here * TILE * TILE + t * TILE + column;
            float4 g_u = gather_row(inbox, row, column);
            if (READS) {
                uint2 w = *(const uint2*)(G_U2 + narrow);
                float4 more = four(w.x, w.y);
                g_u = make_float4(g_u.x + more.x, g_u.y + more.y, g_u.z + more.z, g_u.w + more.w);
            }
            *(float4*)(G_STEPS + narrow) = g_u;
            uint2 words = *(const uint2*)(ZH + narrow);
            float4 zh = four(words.x, words.y), gamma = make_float4(1.f, 1.f, 1.f, 1.f);
            float inverse = 1.f;
            float4 weighted = make_float4(-g_u.x, -g_u.y, -g_u.z, -g_u.w), g_e = weighted;
            if (NORM == 2) {
                inverse = NORMS[here * 2 * TILE + t];
                gamma = *(const float4*)(norm + column);
                float mean = row_sum(weighted) * (1.f / TILE);
                float part = row_sum(weighted.x * zh.x + weighted.y * zh.y + weighted.z * zh.z + weighted.w * zh.w) *
                             (1.f / TILE);
                weighted = make_float4((weighted.x - mean - zh.x * part) * inverse,
                                       (weighted.y - mean - zh.y * part) * inverse,
                                       (weighted.z - mean - zh.z * part) * inverse,
                                       (weighted.w - mean - zh.w * part) * inverse);
                g_e = make_float4(weighted.x * gamma.x, weighted.y * gamma.y, weighted.z * gamma.z,
                                  weighted.w * gamma.w);
            }
            float4 g_f = make_float4(g_e.x * scale, g_e.y * scale, g_e.z * scale, g_e.w * scale);
            if (LOSS == 1) g_f = make_float4(0.f, 0.f, 0.f, 0.f);
            if (LOSS == 2) {
                float v[4] = {0.f, 0.f, 0.f, 0.f}, miss[4] = {zh.x, zh.y, zh.z, zh.w}, k[4] = {0.f, 0.f, 0.f, 0.f};
                if (n * TILE + t < tokens) {
                    uint2 w = *(const uint2*)(v_at + (long)(n * TILE + t) * vt + column);
                    v[0] = low_half(w.x), v[1] = high_half(w.x), v[2] = low_half(w.y), v[3] = high_half(w.y);
                }
                if (NORM > 0) {
                    uint2 w = *(const uint2*)(k_tile + tile_byte(t, column));
                    k[0] = low_half(w.x), k[1] = high_half(w.x), k[2] = low_half(w.y), k[3] = high_half(w.y);
                }
                if (NORM == 2) {
                    float4 beta = *(const float4*)(norm + TILE + column);
                    miss[0] = miss[0] * gamma.x + beta.x, miss[1] = miss[1] * gamma.y + beta.y;
                    miss[2] = miss[2] * gamma.z + beta.z, miss[3] = miss[3] * gamma.w + beta.w;
                }
#pragma unroll
                for (int c = 0; c < 4; ++c) miss[c] = fabsf(k[c] + miss[c] - v[c]);
                g_f = make_float4(miss[0] < threshold ? g_f.x : 0.f, miss[1] < threshold ? g_f.y : 0.f,
                                  miss[2] < threshold ? g_f.z : 0.f, miss[3] < threshold ? g_f.w : 0.f);
            }
            float4 g_z = g_f;
            if (NORM == 2) {
                float along = NORMS[here * 2 * TILE + TILE + t];
                uint2 w = *(const uint2*)(u_tile + tile_byte(t, column));
                float4 u = four(w.x, w.y);
                float4 x = make_float4(g_f.x * gamma.x, g_f.y * gamma.y, g_f.z * gamma.z, g_f.w * gamma.w);
                float mean = row_sum(x) * (1.f / TILE);
                float part = row_sum(x.x * zh.x + x.y * zh.y + x.z * zh.z + x.w * zh.w) * (1.f / TILE);
                float by_u = row_sum(g_u.x * u.x + g_u.y * u.y + g_u.z * u.z + g_u.w * u.w);
                float by_z = row_sum(g_u.x * zh.x + g_u.y * zh.y + g_u.z * zh.z + g_u.w * zh.w);
                float share = inverse * (1.f / TILE);
                g_z.x = (x.x - mean - zh.x * part) * inverse - (zh.x * by_u + weighted.x * along + u.x * by_z) * share;
                g_z.y = (x.y - mean - zh.y * part) * inverse - (zh.y * by_u + weighted.y * along + u.y * by_z) * share;
                g_z.z = (x.z - mean - zh.z * part) * inverse - (zh.z * by_u + weighted.z * along + u.z * by_z) * share;
                g_z.w = (x.w - mean - zh.w * part) * inverse - (zh.w * by_u + weighted.w * along + u.w * by_z) * share;
            }
            push_everywhere(z2_tile, steps, t, column, pack(g_z.x, g_z.y), pack(g_z.z, g_z.w));
        }
        await(steps);
        arrived();
        begin_product<false, true>(g, z2_tile, w_tile);
        begin_product<true, false>(dw2, x_tile, z2_tile);
        end_products();
        settle(g);
        settle(dw2);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) g.f[j][r] = at(g_z1, j, r) + g.f[j][r] * at(slope, j, r);
        g_z1 = packed(g);
        store_tile(dw1_tile, g_z1);
        store_global(G_Z1 + here * TILE * HIDDEN + s * TILE, HIDDEN, g_z1);
        tiles_ready();
        product<true, false, true>(dw1, k_tile, dw1_tile);
        if (HAS_OPEN && n == OPEN[b]) {
            const float* anchor = G_ANCHOR + (long)m * 2 * SIZE;
            add(dw1, load_floats(anchor + first, HIDDEN));
            add(dw2, load_floats(anchor + second, TILE));
        }
        if (HAS_RESETS && RESETS[b * chunks + n]) {
            float* start = G_START + (long)m * PARTS * SIZE;
            add_floats(start + first, HIDDEN, dw1);
            add_floats(start + second, TILE, dw2);
            clear(dw1);
            clear(dw2);
            if (MOMENTUM) {
                add_floats(start + 2 * SIZE + first, HIDDEN, ds1);
                add_floats(start + 2 * SIZE + second, TILE, load_private(ds2_own));
                clear(ds1);
                store_private(ds2_own, ds1);
            }
        }
        __syncthreads();
    }
    store_floats(carried + first, HIDDEN, dw1);
    store_floats(carried + second, TILE, dw2);
    if (MOMENTUM) {
        store_floats(carried + 2 * SIZE + first, HIDDEN, ds1);
        store_floats(carried + 2 * SIZE + second, TILE, load_private(ds2_own));
    }
}
