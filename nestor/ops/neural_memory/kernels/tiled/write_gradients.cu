// The gradients of keys and values, and of coefficients: `write_gradients_kernel` of ../write.py for heads
// and chunks of 64 in bfloat16, from the parts that write_backward.cu leaves. One program a chunk of one
// sequence and head.

extern "C" __global__ void __launch_bounds__(THREADS)
    write_gradients_kernel(const bf16* K, const bf16* V, const bf16* ZH, const float* NORMS,
                           const float* GAMMA, const float* BETA, const float* G_STEPS, const bf16* G_K_PARTS,
                           const float* G_ENDS_PARTS, const float* G_LAST_PARTS, const bf16* READ_K,
                           bf16* G_K, bf16* G_V, float* G_ENDS, float* G_LAST, float* G_NORM, long kb,
                           long kt, long kh, long vb, long vt, long vh, long gb, long gt, long gh, int walks,
                           int heads, int chunks, int tokens, int first_chunk, int span, float scale,
                           float threshold) {
    extern __shared__ __align__(1024) char shared[];
    float *head_k = (float*)shared, *by_norm = head_k + NUMBERS;
    int n = first_chunk + blockIdx.x, m = blockIdx.y, b = m / heads, h = m % heads;
    long here = (long)m * span + blockIdx.x, cell = (long)m * chunks + n;
    int rest = tokens - n * TILE;
    const bf16 *k_at = K + b * kb + h * kh + (long)n * TILE * kt,
               *v_at = V + b * vb + h * vh + (long)n * TILE * vt;
    long out = b * gb + h * gh + (long)n * TILE * gt;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;

    float4 gamma = all_of(1.f), beta = all_of(0.f), g_gamma = beta, g_beta = beta;
    if (NORM == 2)
        gamma = *(const float4*)(GAMMA + h * TILE + column),
        beta = *(const float4*)(BETA + h * TILE + column);
#pragma unroll
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
    __syncthreads();

    Fragment g_k = load_floats(head_k, TILE);
#pragma unroll
    for (int s = 0; s < SPLIT; ++s) add(g_k, load_fragment(G_K_PARTS + (here * SPLIT + s) * NUMBERS));
    if (READS) add(g_k, load_fragment(READ_K + here * NUMBERS));
    store_rows(G_K + out, gt, rest, packed(g_k));

    if (threadIdx.x < 2 * TILE) {
        float sum = 0.f;
        for (int part = 0; part < 2 * SPLIT; ++part)
            sum += G_ENDS_PARTS[(here * 2 * SPLIT + part) * 2 * TILE + threadIdx.x];
        G_ENDS[cell * 2 * TILE + threadIdx.x] = sum;
        if (NORM == 2) {
            sum = G_NORM[cell * 2 * TILE + threadIdx.x];
            for (int r = 0; r < 16; ++r)
                sum += by_norm[((threadIdx.x >> 6) * 16 + r) * TILE + (threadIdx.x & 63)];
            G_NORM[cell * 2 * TILE + threadIdx.x] = sum;
        }
    } else if (threadIdx.x < 2 * TILE + 3) {
        int i = threadIdx.x - 2 * TILE;
        float sum = 0.f;
        for (int part = 0; part < SPLIT * THREADS / 32; ++part)
            sum += G_LAST_PARTS[(here * SPLIT * THREADS / 32 + part) * 4 + i];
        G_LAST[cell * 4 + i] = sum;
    }
}
