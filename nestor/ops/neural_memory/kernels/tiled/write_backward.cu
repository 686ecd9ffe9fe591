// The gradient of the writes, last chunk first: `write_backward_kernel` of ../write.py for heads and chunks of 64 in
// bfloat16. Programs, sums over them and order in memory as in write.cu; AFTER and G_Z1 as tiles; G_STATES, G_U1 and
// G_X2, what the reads of each chunk add, as fragments.

// g (a B) + e (a C), rows scaled by g and e.
template <bool TB>
__device__ __forceinline__ Fragment through_steps(const char* a, const char* b, const char* c, const float (&g)[2],
                                                  const float (&e)[2], int side) {
    Fragment x, y;
    begin_product<false, TB, false>(x, a, b, side);
    if (MOMENTUM) begin_product<false, TB, false>(y, a, c, side);
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

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, BLOCKS) write_backward_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const float* LAST, const bf16* STATES, const bf16* STEPS,
    const bf16* HIDDENS, const bf16* ZH, const float* NORMS, const bf16* TARGETS, const float* GAMMA,
    const float* BETA, const unsigned char* RESETS, const int* OPEN, const bf16* G_STATES, const bf16* G_U1,
    const bf16* G_X2, const bf16* G_U2, float* CARRIED, bf16* AFTER, bf16* G_Z1, float* G_STEPS,
    const float* G_ANCHOR, float* G_START, long kb, long kt, long kh, long vb, long vt, long vh, int walks,
    int heads, int chunks, int tokens, int first_chunk, int span, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    char *k_tile = shared, *u_tile = k_tile + TILE_BYTES, *z2_tile = u_tile + TILE_BYTES,
         *x_tile = z2_tile + TILE_BYTES, *w_tile = x_tile + TILE_BYTES, *dw1_tile = w_tile + TILE_BYTES,
         *dw2_tile = dw1_tile + TILE_BYTES, *pulled_tile = dw2_tile + TILE_BYTES, *end = pulled_tile + TILE_BYTES;
    char* m_tile = end;
    if (TARGET) end += TILE_BYTES;
    char *ds1_tile = end, *ds2_tile = end + TILE_BYTES;
    if (MOMENTUM) end += 2 * TILE_BYTES;
    float *inbox = (float*)end, *norm = inbox + NUMBERS;
    Arrival parts = {(u64*)(norm + 2 * TILE), INBOX_BYTES, 0}, steps = {parts.barrier + 1, TILE_BYTES, 0};
    Arrival operands = {parts.barrier + 2, 3 * TILE_BYTES, 0}, targets = {parts.barrier + 3, TILE_BYTES, 0};

    int s = blockIdx.x % SPLIT, m = blockIdx.x / SPLIT, b = m / heads, h = m % heads;
    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    float* carried = CARRIED + (long)m * PARTS * SIZE;
    long kind = (long)walks * span * SIZE;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    int first = s * TILE, second = SIZE + s * NUMBERS;
    Fragment dw1 = load_floats(carried + first, HIDDEN), dw2 = load_floats(carried + second, TILE), ds1, ds2;
    if (MOMENTUM) {
        ds1 = load_floats(carried + 2 * SIZE + first, HIDDEN);
        ds2 = load_floats(carried + 2 * SIZE + second, TILE);
    }
    int last = min(first_chunk + span, chunks) - 1;
    // What comes as tiles for chunk n, by thread 0.
    auto fetch_chunk = [&](int n) {
        long here = (long)m * span + n - first_chunk;
        expect(operands);
        fetch(x_tile, HIDDENS + (here * SPLIT + s) * NUMBERS, operands);
        fetch(w_tile, STATES + (here * PARTS * SPLIT + SPLIT + s) * NUMBERS, operands);
        fetch(u_tile, STEPS + here * NUMBERS, operands);
    };
    Pieces keys = load_pieces(k_at + (long)last * TILE * kt, kt, tokens - last * TILE);
    if (threadIdx.x == 0) {
        prepare(operands);
        if (TARGET) prepare(targets);
    }
    prepare_walk(parts, steps);
    if (threadIdx.x == 0) fetch_chunk(last);
    if (TARGET) {
        if (threadIdx.x == 0) {
            expect(targets);
            fetch(m_tile, TARGETS + ((long)h * 2 * SPLIT + SPLIT + s) * NUMBERS, targets);
        }
        await(targets);
    }

    for (int n = last; n >= first_chunk; --n) {
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk, wide = (here * SPLIT + s) * NUMBERS;
        const bf16* reads = G_STATES + (here * PARTS * SPLIT + s) * NUMBERS;
        Packed slope = load_fragment(HIDDENS + kind + wide), bend = load_fragment(HIDDENS + 3 * kind + wide), extra;
        if (READS) extra = load_fragment(G_U1 + wide);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        store_pieces(k_tile, keys);
        store_tile(dw1_tile, packed(dw1));
        store_tile(dw2_tile, packed(dw2));
        if (MOMENTUM) {
            store_tile(ds1_tile, packed(ds1));
            store_tile(ds2_tile, packed(ds2));
        }
        await(operands);
        tiles_ready();
        if (threadIdx.x == 0) {
            bf16* after = AFTER + (here * PARTS * SPLIT + s) * NUMBERS;
            send(after, dw1_tile);
            send(after + SIZE, dw2_tile);
            if (MOMENTUM) {
                send(after + 2 * SIZE, ds1_tile);
                send(after + 3 * SIZE, ds2_tile);
            }
            if (n > first_chunk) {
                long before = here - 1, wide = (before * SPLIT + s) * NUMBERS;
                bring(HIDDENS + wide);
                bring(HIDDENS + kind + wide);
                bring(HIDDENS + 3 * kind + wide);
                bring(STATES + (before * PARTS * SPLIT + SPLIT + s) * NUMBERS);
                bring(STEPS + before * NUMBERS);
                for (int part = 0; part < PARTS; ++part)
                    bring(G_STATES + (before * PARTS * SPLIT + s) * NUMBERS + part * SIZE);
                if (READS) {
                    bring(G_U1 + wide);
                    bring(G_X2 + wide);
                    bring(G_U2 + before * NUMBERS);
                }
            }
        }

        // The steps, as the state takes them and as the reads see them; u_1 = (u_2 W2^T) phi'(z_1).
        Fragment g = through_steps<false>(k_tile, dw1_tile, ds1_tile, g_end, e_end, side);
        if (READS) add(g, extra);
        Packed g_z1 = packed(times(g, bend));
        store_tile(pulled_tile, packed(times(g, slope)));
        g = through_steps<false>(x_tile, dw2_tile, ds2_tile, g_end, e_end, side);
        if (READS) extra = load_fragment(G_X2 + wide);
        tiles_ready();
        begin_product<false, false, true>(g, pulled_tile, w_tile, side);
        if (TARGET) begin_product<false, false, true>(g, pulled_tile, m_tile, side);
        end_products();
        settle(g);
        push_rows(inbox, parts, s, g);
        // While the parts travel: the gradient of x_2 from its steps, and what the state passes on.
        Packed more1 = load_fragment(reads), more2 = load_fragment(reads + SIZE);
        g = through_steps<true>(u_tile, dw2_tile, ds2_tile, g_end, e_end, side);
        if (READS) add(g, extra);
        if (MOMENTUM) {
            combine(ds1, decay, F, dw1);
            combine(ds2, decay, F, dw2);
        }
        multiply(dw1, A);
        multiply(dw2, A);
        add(dw1, more1);
        add(dw2, more2);
        if (MOMENTUM && READS) {
            add(ds1, load_fragment(reads + 2 * SIZE));
            add(ds2, load_fragment(reads + 3 * SIZE));
        }
        begin_product<true, false, true>(dw2, pulled_tile, u_tile, side);
        end_products();
        settle(dw2);
        if (threadIdx.x == 0) sent();
        await_and_expect(parts);

        // u_2 from z_2, in the rows that this program owns.
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int row = r * 16 + own, t = s * ROWS + row;
            long narrow = here * NUMBERS + t * TILE + column;
            float4 g_u = gather_row(inbox, row, column);
            if (READS) g_u = g_u + four(*(const uint2*)(G_U2 + narrow));
            *(float4*)(G_STEPS + narrow) = g_u;
            float4 zh = four(*(const uint2*)(ZH + narrow)), gamma = all_of(1.f), beta = all_of(0.f);
            float inverse = 1.f;
            if (NORM == 2) {
                inverse = NORMS[here * 2 * TILE + t];
                gamma = *(const float4*)(norm + column), beta = *(const float4*)(norm + TILE + column);
            }
            float4 weighted = through_norm(g_u * -1.f, zh, inverse), f = zh, v = zh;
            if (LOSS == 2) {
                v = all_of(0.f);
                if (n * TILE + t < tokens) v = four(*(const uint2*)(v_at + (long)(n * TILE + t) * vt + column));
                f = head(load_four(k_tile, t, column), zh, gamma, beta);
            }
            float4 g_z = output_gradient(weighted * gamma, f, v, scale, threshold);
            if (NORM == 2) {
                float along = NORMS[here * 2 * TILE + TILE + t], share = inverse * (1.f / TILE);
                float4 u = load_four(u_tile, t, column);
                float4 by = zh * row_sum(g_u * u) + weighted * along + u * row_sum(g_u * zh);
                g_z = through_norm(g_z * gamma, zh, inverse) - by * share;
            }
            push_everywhere(z2_tile, steps, t, column, pack_four(g_z));
        }
        await_and_expect(steps);
        arrived();

        begin_product<false, true, true>(g, z2_tile, w_tile, side);
        if (TARGET) begin_product<false, true, true>(g, z2_tile, m_tile, side);
        begin_product<true, false, true>(dw2, x_tile, z2_tile, side);
        if (n > first_chunk) keys = load_pieces(k_at + (long)(n - 1) * TILE * kt, kt, TILE);
        end_products();
        settle(g), settle(dw2);
        FOR_EACH g.f[j][r] = at(g_z1, j, r) + g.f[j][r] * at(slope, j, r);
        store_tile(dw1_tile, packed(g));
        tiles_ready();
        if (threadIdx.x == 0) {
            send(G_Z1 + wide, dw1_tile);
            // All have read what comes as tiles.
            if (n > first_chunk) fetch_chunk(n - 1);
        }
        begin_product<true, false, true>(dw1, k_tile, dw1_tile, side);
        if (threadIdx.x == 0) sent();
        end_products();
        settle(dw1);
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
                add_floats(start + 2 * SIZE + second, TILE, ds2);
                clear(ds1);
                clear(ds2);
            }
        }
        __syncthreads();
    }
    store_floats(carried + first, HIDDEN, dw1);
    store_floats(carried + second, TILE, dw2);
    if (MOMENTUM) {
        store_floats(carried + 2 * SIZE + first, HIDDEN, ds1);
        store_floats(carried + 2 * SIZE + second, TILE, ds2);
    }
}
