// One token of every sequence: `decode_kernel` of ../decode.py for heads of 64 and hidden widths of up to 4
// x 64.
//
// A cluster takes one sequence and head; each program a slice of 64 of the hidden width. It reads its part of
// the State once, all of it before it waits for anything, and writes it once; no matrix units, for all is
// float32. z_2 and the output are sums over the programs. Sixteen threads to a row of 64 numbers, sixteen
// rows at a time.

// q, k, v and y in bfloat16 or float32.
#if EXACT
typedef float NUMBER;
__device__ __forceinline__ float number(float x) {
    return x;
}
__device__ __forceinline__ float rounded(float x) {
    return x;
}
#else
typedef bf16 NUMBER;
__device__ __forceinline__ float number(bf16 x) {
    return __uint_as_float((u32)x << 16);
}
__device__ __forceinline__ bf16 rounded(float x) {
    return (bf16)(pack(x, 0.f) & 0xffffu);
}
#endif

struct Block {
    float4 row[4];
};
__device__ __forceinline__ Block load_block(const float* base, int stride) {
    Block x;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        x.row[i] =
            __ldcs((const float4*)(base + ((threadIdx.x >> 4) + 16 * i) * stride + (threadIdx.x & 15) * 4));
    return x;
}
__device__ __forceinline__ void store_block(float* base, int stride, const Block& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        __stcs((float4*)(base + ((threadIdx.x >> 4) + 16 * i) * stride + (threadIdx.x & 15) * 4), x.row[i]);
}
// v W for v [64] in shared memory: each warp's part to `parts` [8, 64].
__device__ __forceinline__ void through_rows(const float* v, const Block& w, float* parts) {
    float4 sum = all_of(0.f);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = sum + w.row[i] * v[(threadIdx.x >> 4) + 16 * i];
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, 16);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, 16);
    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, 16);
    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, 16);
    if (lane_id() < 16) *(float4*)(parts + (threadIdx.x >> 5) * TILE + lane_id() * 4) = sum;
}
__device__ __forceinline__ float sum_of_parts(const float* parts, int count, int at) {
    float sum = 0.f;
    for (int i = 0; i < count; ++i) sum += parts[i * TILE + at];
    return sum;
}
// The sum over the programs of what each has in its first 64 threads; both barriers are the cluster's.
__device__ __forceinline__ float sum_over_cluster(float own, float* inbox, int rank) {
    if (threadIdx.x < TILE)
#pragma unroll
        for (int other = 0; other < SPLIT; ++other)
            asm volatile(
                "st.shared::cluster.f32 [%0], %1;" ::"r"(remote(inbox + rank * TILE + threadIdx.x, other)),
                "f"(own)
                : "memory");
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
    return threadIdx.x < TILE ? sum_of_parts(inbox, SPLIT, threadIdx.x) : 0.f;
}
// The state's W and S after the write, and W before it.
__device__ __forceinline__ void step(Block& w, Block& s, const float* target, int stride, const float* left,
                                     const float* right, float theta, float eta, float alpha) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int row = (threadIdx.x >> 4) + 16 * i;
        float4 move = *(const float4*)(right + (threadIdx.x & 15) * 4) * (theta * left[row]);
        if (MOMENTUM) {
            move = move + s.row[i] * eta;
            s.row[i] = move;
        }
        if (FORGET) w.row[i] = w.row[i] * (1.f - alpha);
        if (FORGET && TARGET)
            w.row[i] = w.row[i] + *(const float4*)(target + row * stride + (threadIdx.x & 15) * 4) * alpha;
        w.row[i] = w.row[i] + move;
    }
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, 2)
    decode_kernel(const NUMBER* Q, const NUMBER* K, const NUMBER* V, const float* THETA, const float* ETA,
                  const float* ALPHA, const long* PHASE, const float* W1, const float* W2, const float* S1,
                  const float* S2, const float* A1, const float* A2, const float* M1, const float* M2,
                  const float* GAMMA, const float* BETA, NUMBER* Y, float* NEW_W1, float* NEW_W2,
                  float* NEW_S1, float* NEW_S2, float* NEW_A1, float* NEW_A2, int heads, int chunk, float eps,
                  float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    float *q = (float*)shared, *k = q + TILE, *x = k + TILE, *slope = x + TILE, *u1 = slope + TILE,
          *u2 = u1 + TILE;
    float *parts = u2 + TILE, *inbox = parts + 8 * TILE, *other_inbox = inbox + SPLIT * TILE;
    int rank = blockIdx.x % SPLIT, m = blockIdx.x / SPLIT, b = m / heads, h = m % heads;
    long first = (long)m * SIZE + rank * TILE, second = (long)m * SIZE + rank * NUMBERS;
    Block a1 = load_block(A1 + first, HIDDEN), a2 = load_block(A2 + second, TILE);
    Block w1 = load_block(W1 + first, HIDDEN), w2 = load_block(W2 + second, TILE), s1, s2;
    if (MOMENTUM) s1 = load_block(S1 + first, HIDDEN), s2 = load_block(S2 + second, TILE);
    int c = threadIdx.x & 63;
    if (threadIdx.x < TILE) q[c] = number(Q[m * TILE + c]), k[c] = number(K[m * TILE + c]);
    float theta = THETA[m], eta = MOMENTUM ? ETA[m] : 0.f, alpha = FORGET ? ALPHA[m] : 0.f;
    bool closes = PHASE[b] + 1 == chunk;
    // All programs have begun before one writes to another. Relaxed, for it publishes nothing: with a release
    // it would wait for all that is under way.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    __syncthreads();

    through_rows(k, a1, parts);
    __syncthreads();
    if (threadIdx.x < TILE) {
        float curvature;
        activate(sum_of_parts(parts, 8, c), x[c], slope[c], curvature);
    }
    __syncthreads();
    through_rows(x, a2, parts);
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    __syncthreads();
    float z = sum_over_cluster(threadIdx.x < TILE ? sum_of_parts(parts, 8, c) : 0.f, inbox, rank);
    if (threadIdx.x < TILE) u1[c] = z;
    __syncthreads();
    // u_2, four columns to each of the first sixteen threads.
    if (threadIdx.x < 32) {
        int column = (threadIdx.x & 15) * 4;
        float4 gamma = all_of(1.f), beta = all_of(0.f), kk = *(float4*)(k + column), zh;
        if (NORM == 2)
            gamma = *(const float4*)(GAMMA + h * TILE + column),
            beta = *(const float4*)(BETA + h * TILE + column);
        const NUMBER* at = V + m * TILE + column;
        float4 v = make_float4(number(at[0]), number(at[1]), number(at[2]), number(at[3]));
        float inverse;
        zh = standardise(*(float4*)(u1 + column), eps, inverse);
        float4 e = loss_error(head(kk, zh, gamma, beta), v, scale, threshold) * gamma;
        *(float4*)(u2 + column) = through_norm(e, zh, inverse) * -1.f;
    }
    __syncthreads();
    {
        float4 u = *(float4*)(u2 + (threadIdx.x & 15) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float pulled = row_sum(a2.row[i] * u);
            int row = (threadIdx.x >> 4) + 16 * i;
            if ((threadIdx.x & 15) == 0) u1[row] = pulled * slope[row];
        }
    }
    __syncthreads();
    Block r1 = w1, r2 = w2;
    step(w1, s1, M1 + (long)h * SIZE + rank * TILE, HIDDEN, k, u1, theta, eta, alpha);
    step(w2, s2, M2 + (long)h * SIZE + rank * NUMBERS, TILE, x, u2, theta, eta, alpha);
    if (READ == 0) r1 = w1, r2 = w2;
    if (READ == 2) r1 = a1, r2 = a2;
    through_rows(q, r1, parts);
    __syncthreads();
    if (threadIdx.x < TILE) {
        float a, d;
        activate(sum_of_parts(parts, 8, c), x[c], a, d);
    }
    __syncthreads();
    through_rows(x, r2, parts);
    __syncthreads();
    z = sum_over_cluster(threadIdx.x < TILE ? sum_of_parts(parts, 8, c) : 0.f, other_inbox, rank);
    // The State last: a barrier of the cluster waits for what is stored before it.
    store_block(NEW_W1 + first, HIDDEN, w1);
    store_block(NEW_W2 + second, TILE, w2);
    if (MOMENTUM) {
        store_block(NEW_S1 + first, HIDDEN, s1);
        store_block(NEW_S2 + second, TILE, s2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (closes) a1.row[i] = w1.row[i], a2.row[i] = w2.row[i];
    store_block(NEW_A1 + first, HIDDEN, a1);
    store_block(NEW_A2 + second, TILE, a2);
    if (threadIdx.x < TILE) u1[c] = z;
    __syncthreads();
    if (rank == 0 && threadIdx.x < 32) {
        int column = (threadIdx.x & 15) * 4;
        float4 gamma = all_of(1.f), beta = all_of(0.f), qq = *(float4*)(q + column);
        if (NORM == 2)
            gamma = *(const float4*)(GAMMA + h * TILE + column),
            beta = *(const float4*)(BETA + h * TILE + column);
        float inverse;
        float4 y = head(qq, standardise(*(float4*)(u1 + column), eps, inverse), gamma, beta);
        NUMBER* at = Y + m * TILE + column;
        if (threadIdx.x < 16)
            at[0] = rounded(y.x), at[1] = rounded(y.y), at[2] = rounded(y.z), at[3] = rounded(y.w);
    }
}
