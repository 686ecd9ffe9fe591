// The gradients of keys, values and coefficients: `write_gradients_kernel` of ../write.py for heads and chunks of 64 in
// bfloat16. One program a chunk of one sequence and head; it walks the hidden width in SPLIT slices of 64.
// Order in memory as in write.cu, write_backward.cu and read_backward.cu.

struct Slice {
    char *w1, *dw1, *dw2, *g_z1, *u1, *x2, *w2, *m1, *s1, *s2, *ds1, *ds2;
};
static const int OPERANDS = 7 + (TARGET ? 1 : 0) + (MOMENTUM ? 4 : 0);

__device__ __forceinline__ float dot_words(u32 x, u32 y) {
    return low_half(x) * low_half(y) + high_half(x) * high_half(y);
}
__device__ __forceinline__ float dot_pieces(uint4 a, uint4 b) {
    return dot_words(a.x, b.x) + dot_words(a.y, b.y) + dot_words(a.z, b.z) + dot_words(a.w, b.w);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) write_gradients_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const bf16* STATES, const bf16* STEPS, const bf16* HIDDENS,
    const bf16* ZH, const float* NORMS, const bf16* TARGETS, const float* GAMMA, const float* BETA, const bf16* AFTER,
    const bf16* G_Z1, const float* G_STEPS, const bf16* READ_K, bf16* G_K, bf16* G_V, float* G_ENDS, float* G_LAST,
    float* G_NORM, long kb, long kt, long kh, long vb, long vt, long vh, long gb, long gt, long gh, int walks, int heads,
    int chunks, int tokens, int first_chunk, int span, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    char *u2_tile = shared, *end = u2_tile + TILE_BYTES;
    Slice o;
    o.w1 = end, o.dw1 = end + TILE_BYTES, o.dw2 = end + 2 * TILE_BYTES, o.g_z1 = end + 3 * TILE_BYTES;
    o.u1 = end + 4 * TILE_BYTES, o.x2 = end + 5 * TILE_BYTES, o.w2 = end + 6 * TILE_BYTES;
    end += 7 * TILE_BYTES;
    o.s1 = end, o.s2 = end + TILE_BYTES, o.ds1 = end + 2 * TILE_BYTES, o.ds2 = end + 3 * TILE_BYTES;
    if (MOMENTUM) end += 4 * TILE_BYTES;
    o.m1 = end;
    if (TARGET) end += TILE_BYTES;
    u64* barriers = (u64*)end;
    Arrival slice = {barriers, OPERANDS * TILE_BYTES, 0}, step = {barriers + 1, TILE_BYTES, 0};

    int at_chunk = blockIdx.x, n = first_chunk + at_chunk, m = blockIdx.y, b = m / heads, h = m % heads;
    long here = (long)m * span + at_chunk, cell = (long)m * chunks + n, kind = (long)walks * span * SIZE;
    int rest = tokens - n * TILE;
    const bf16 *states = STATES + here * PARTS * SIZE, *after = AFTER + here * PARTS * SIZE;
    const bf16 *hidden = HIDDENS + here * SIZE, *g_z1 = G_Z1 + here * SIZE;
    const bf16 *k_at = K + b * kb + h * kh + (long)n * TILE * kt, *v_at = V + b * vb + h * vh + (long)n * TILE * vt;
    long out = b * gb + h * gh + (long)n * TILE * gt;

    // By thread 0.
    auto fetch_slice = [&](int i) {
        opaque(i);
        int tile = i * NUMBERS;
        expect(slice);
        fetch(o.w1, states + tile, slice);
        fetch(o.w2, states + SIZE + tile, slice);
        fetch(o.dw1, after + tile, slice);
        fetch(o.dw2, after + SIZE + tile, slice);
        fetch(o.g_z1, g_z1 + tile, slice);
        fetch(o.x2, hidden + tile, slice);
        fetch(o.u1, hidden + 2 * kind + tile, slice);
        if (TARGET) fetch(o.m1, TARGETS + (long)h * 2 * SIZE + tile, slice);
        if (MOMENTUM) {
            fetch(o.s1, states + 2 * SIZE + tile, slice);
            fetch(o.s2, states + 3 * SIZE + tile, slice);
            fetch(o.ds1, after + 2 * SIZE + tile, slice);
            fetch(o.ds2, after + 3 * SIZE + tile, slice);
        }
    };
    if (threadIdx.x == 0) {
        prepare(slice), prepare(step);
        prepared();
        expect(step);
        fetch(u2_tile, STEPS + here * NUMBERS, step);
        fetch_slice(0);
    }
    __syncthreads();

    // g_k, as a fragment: through W1 z_1, and through the steps, with the end coefficients as row scales.
    Fragment g_k, by_w, by_s;
    clear(g_k), clear(by_w), clear(by_s);
    float g_end[2] = {0.f, 0.f}, e_end[2] = {0.f, 0.f}, g_A = 0.f, g_F = 0.f, g_m = 0.f;
    await(step);
#pragma unroll 1
    for (int i = 0; i < SPLIT; ++i) {
        await(slice);
        tiles_ready();
        Fragment x, y;
        begin_product<false, true, false>(x, u2_tile, o.dw2, side);
        if (MOMENTUM) begin_product<false, true, false>(y, u2_tile, o.ds2, side);
        begin_product<false, true, true>(g_k, o.g_z1, o.w1, side);
        if (TARGET) begin_product<false, true, true>(g_k, o.g_z1, o.m1, side);
        begin_product<false, true, true>(by_w, o.u1, o.dw1, side);
        if (MOMENTUM) begin_product<false, true, true>(by_s, o.u1, o.ds1, side);
        // The thread's share of dW * D, dW * S and dS * S; one piece after the other, to spare registers.
#pragma unroll 1
        for (int piece = 0; piece < 4; ++piece) {
            int place = threadIdx.x * 16 + (piece & 1) * THREADS * 16;
            bool lower = piece < 2;
            uint4 dw = *(const uint4*)((lower ? o.dw1 : o.dw2) + place);
            g_A += dot_pieces(*(const uint4*)((lower ? o.w1 : o.w2) + place), dw);
            if (MOMENTUM) {
                uint4 momentum = *(const uint4*)((lower ? o.s1 : o.s2) + place);
                g_F += dot_pieces(momentum, dw);
                g_m += dot_pieces(momentum, *(const uint4*)((lower ? o.ds1 : o.ds2) + place));
            }
        }
        Packed x2 = load_tile(o.x2);
        end_products();
        settle(x), settle(g_k), settle(by_w);
        if (MOMENTUM) settle(y), settle(by_s);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            g_end[r] += row_part(times(x, x2), r);
            if (MOMENTUM) e_end[r] += row_part(times(y, x2), r);
        }
        tiles_ready();
        if (threadIdx.x == 0 && i + 1 < SPLIT) fetch_slice(i + 1);
    }

    // The operands' place holds sums now, and g_k from the head.
    float* sums = (float*)o.w1;
    float* head_k = (float*)o.dw1;
    float* by_norm = (float*)o.g_z1;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    {
        float4 gamma = all_of(1.f), beta = all_of(0.f), g_gamma = beta, g_beta = beta;
        if (NORM == 2)
            gamma = *(const float4*)(GAMMA + h * TILE + column), beta = *(const float4*)(BETA + h * TILE + column);
#pragma unroll 1
        for (int r = 0; r < 4; ++r) {
            int t = r * 16 + own;
            long narrow = here * NUMBERS + t * TILE + column;
            float4 k = all_of(0.f), v = k;
            if (t < rest) {
                k = four(*(const uint2*)(k_at + t * kt + column));
                v = four(*(const uint2*)(v_at + t * vt + column));
            }
            float4 zh = four(*(const uint2*)(ZH + narrow)), g_u = *(const float4*)(G_STEPS + narrow);
            float4 f = head(k, zh, gamma, beta);
            float4 weighted = through_norm(g_u * -1.f, zh, NORM == 2 ? NORMS[here * 2 * TILE + t] : 1.f);
            float4 g_e = weighted * gamma, g_f = output_gradient(g_e, f, v, scale, threshold);
            float4 g_v = LOSS == 1 ? g_e * -scale : g_f * -1.f;
            if (t < rest) *(uint2*)(G_V + out + t * gt + column) = pack_four(g_v);
            *(float4*)(head_k + t * TILE + column) = NORM == 0 ? all_of(0.f) : g_f;
            g_gamma = g_gamma + loss_error(f, v, scale, threshold) * weighted + g_f * zh;
            g_beta = g_beta + g_f;
        }
        if (NORM == 2) {
            *(float4*)(by_norm + own * TILE + column) = g_gamma;
            *(float4*)(by_norm + (16 + own) * TILE + column) = g_beta;
        }
    }
    // Ends with barriers: what the threads left above is there.
    float scale_g[2], scale_e[2] = {0.f, 0.f};
    const float* ends = ENDS + cell * 2 * TILE;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        scale_g[r] = ends[own_row() + 8 * r];
        if (MOMENTUM) scale_e[r] = ends[TILE + own_row() + 8 * r];
    }
    Packed k = load_rows(k_at, kt, rest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        g_end[r] += row_part(times(by_w, k), r);
        if (MOMENTUM) e_end[r] += row_part(times(by_s, k), r);
    }
    sum_rows(g_end, sums);
    sum_rows(e_end, sums);
    if ((lane_id() & 3) == 0 && threadIdx.x < THREADS / 2)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            G_ENDS[here * 2 * TILE + own_row() + 8 * r] = g_end[r];
            G_ENDS[here * 2 * TILE + TILE + own_row() + 8 * r] = e_end[r];
        }
    if (NORM == 2 && threadIdx.x < 2 * TILE) {
        float sum = G_NORM[here * 2 * TILE + threadIdx.x];
        for (int r = 0; r < 16; ++r) sum += by_norm[((threadIdx.x >> 6) * 16 + r) * TILE + (threadIdx.x & 63)];
        G_NORM[here * 2 * TILE + threadIdx.x] = sum;
    }
    scale_rows(by_w, scale_g);
    add(g_k, by_w);
    if (MOMENTUM) {
        scale_rows(by_s, scale_e);
        add(g_k, by_s);
    }
    add(g_k, load_floats(head_k, TILE));
    if (READS) add(g_k, load_fragment(READ_K + here * NUMBERS));
    store_rows(G_K + out, gt, rest, packed(g_k));

#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        g_A += __shfl_xor_sync(0xffffffffu, g_A, d);
        g_F += __shfl_xor_sync(0xffffffffu, g_F, d);
        g_m += __shfl_xor_sync(0xffffffffu, g_m, d);
    }
    if (lane_id() == 0) {
        float* mine = sums + (threadIdx.x >> 5) * 3;
        mine[0] = g_A, mine[1] = g_F, mine[2] = g_m;
    }
    __syncthreads();
    if (threadIdx.x < 3) {
        float sum = 0.f;
        for (int w = 0; w < THREADS / 32; ++w) sum += sums[w * 3 + threadIdx.x];
        G_LAST[here * 4 + threadIdx.x] = sum;
    }
}
