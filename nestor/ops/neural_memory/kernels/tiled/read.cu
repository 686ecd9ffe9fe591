// The reads: `read_kernel` of ../read.py for heads and chunks of 64 in bfloat16. One program a chunk of one
// sequence and head; it walks the hidden width in SPLIT slices of 64, the operands of the next slice on their
// way while it works on one. Without DUAL all queries see the weights at the chunk's start. Order in memory
// as in write.cu.

static const bool SURPRISED = DUAL && MOMENTUM;  // whether queries see the momentum
static const int OPERANDS = 2 + (SURPRISED ? 2 : 0) + (TARGET ? 2 : 0);

struct Slice {
    char *w1, *w2, *s1, *s2, *m1, *m2;
};
__device__ __forceinline__ Slice slice_at(char* tiles) {
    Slice x;
    x.w1 = tiles, x.w2 = x.w1 + TILE_BYTES, x.s1 = x.w2 + TILE_BYTES, x.s2 = x.s1 + TILE_BYTES;
    x.m1 = x.w2 + (SURPRISED ? 3 : 1) * TILE_BYTES, x.m2 = x.m1 + TILE_BYTES;
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    read_kernel(const bf16* Q, const bf16* K, const float* SCALES, const bf16* G, const bf16* STATES,
                const bf16* STEPS, const bf16* TARGETS, const float* GAMMA, const float* BETA, bf16* Y,
                bf16* Z, float* R, long qb, long qt, long qh, long kb, long kt, long kh, long yb, long yt,
                long yh, int walks, int heads, int chunks, int tokens, int first_chunk, int span, float eps) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    char *q_tile = shared, *k_tile = q_tile + TILE_BYTES, *u2_tile = k_tile + TILE_BYTES,
         *weighted_tile = u2_tile + TILE_BYTES, *x2_tile = weighted_tile + TILE_BYTES,
         *u1_tile = x2_tile + TILE_BYTES, *x_tile = u1_tile + TILE_BYTES, *operands = x_tile + TILE_BYTES;
    u64* barriers = (u64*)(operands + 2 * OPERANDS * TILE_BYTES);
    Arrival slices[2] = {{barriers, OPERANDS * TILE_BYTES, 0}, {barriers + 1, OPERANDS * TILE_BYTES, 0}};
    Arrival step = {barriers + 2, TILE_BYTES, 0};

    int at_chunk = blockIdx.x, n = first_chunk + at_chunk, m = blockIdx.y, b = m / heads, h = m % heads;
    long here = (long)m * span + at_chunk, cell = (long)m * chunks + n;
    int rest = tokens - n * TILE;
    const bf16 *states = STATES + here * PARTS * SIZE, *targets = TARGETS + (long)h * 2 * SIZE;

    // By thread 0.
    auto fetch_slice = [&](int i) {
        opaque(i);
        const Arrival& arrival = slices[i & 1];
        Slice x = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        int tile = i * NUMBERS;
        expect(arrival);
        fetch(x.w1, states + tile, arrival);
        fetch(x.w2, states + SIZE + tile, arrival);
        if (SURPRISED) {
            fetch(x.s1, states + 2 * SIZE + tile, arrival);
            fetch(x.s2, states + 3 * SIZE + tile, arrival);
        }
        if (TARGET) {
            fetch(x.m1, targets + tile, arrival);
            fetch(x.m2, targets + SIZE + tile, arrival);
        }
    };
    if (threadIdx.x == 0) {
        prepare(slices[0]), prepare(slices[1]), prepare(step);
        prepared();
        if (DUAL) {
            expect(step);
            fetch(u2_tile, STEPS + here * NUMBERS, step);
        }
        fetch_slice(0);
        if (SPLIT > 1) fetch_slice(1);
    }
    // All from memory at once.
    Pieces queries = load_pieces(Q + b * qb + h * qh + (long)n * TILE * qt, qt, rest), keys;
    Packed coefficients;
    if (DUAL) {
        keys = load_pieces(K + b * kb + h * kh + (long)n * TILE * kt, kt, rest);
        coefficients = load_rows(G + cell * NUMBERS, TILE, TILE);
    }
    float A[2] = {1.f, 1.f}, F[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; DUAL && r < 2; ++r) {
        A[r] = SCALES[cell * 3 * TILE + own_row() + 8 * r];
        F[r] = SCALES[cell * 3 * TILE + TILE + own_row() + 8 * r];
    }
    store_pieces(q_tile, queries);
    if (DUAL) store_pieces(k_tile, keys);
    tiles_ready();
    Fragment scores;
    if (DUAL) {
        begin_product<false, true, false>(scores, q_tile, k_tile, side);
        end_products();
        settle(scores);
        store_tile(weighted_tile, packed(times(scores, coefficients)));
        await(step);
    }
    // Sums over the slices: x x_2^T, and x times each of the second layer's weights.
    Fragment through_w, through_s, through_m;
    clear(scores), clear(through_w), clear(through_s), clear(through_m);

#pragma unroll 1
    for (int i = 0; i < SPLIT; ++i) {
        if (i & 1)
            await(slices[1]);
        else
            await(slices[0]);
        tiles_ready();
        Slice o = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        Fragment z, zw, zs, x2, u1;
        if (DUAL) {
            begin_product<false, false, false>(x2, k_tile, o.w1, side);
            if (TARGET) begin_product<false, false, true>(x2, k_tile, o.m1, side);
            begin_product<false, true, false>(u1, u2_tile, o.w2, side);
            if (TARGET) begin_product<false, true, true>(u1, u2_tile, o.m2, side);
        }
        begin_product<false, false, false>(zw, q_tile, o.w1, side);
        if (SURPRISED) begin_product<false, false, false>(zs, q_tile, o.s1, side);
        if (TARGET) begin_product<false, false, false>(z, q_tile, o.m1, side);
        end_products();
        if (DUAL) settle(x2), settle(u1);
        settle(zw);
        if (SURPRISED) settle(zs);
        if (TARGET) settle(z);
        if (DUAL) {
            FOR_EACH {
                float slope, curvature;
                activate(x2.f[j][r], x2.f[j][r], slope, curvature);
                u1.f[j][r] *= slope;
            }
            store_tile(x2_tile, packed(x2));
            store_tile(u1_tile, packed(u1));
            tiles_ready();
            begin_product<false, false, TARGET>(z, weighted_tile, u1_tile, side);
            end_products();
            settle(z);
        } else if (!TARGET) {
            clear(z);
        }
        FOR_EACH {
            float slope, curvature;
            z.f[j][r] += A[r >> 1] * zw.f[j][r];
            if (SURPRISED) z.f[j][r] += F[r >> 1] * zs.f[j][r];
            activate(z.f[j][r], z.f[j][r], slope, curvature);
        }
        store_tile(x_tile, packed(z));
        tiles_ready();
        if (DUAL) begin_product<false, true, true>(scores, x_tile, x2_tile, side);
        begin_product<false, false, true>(through_w, x_tile, o.w2, side);
        if (SURPRISED) begin_product<false, false, true>(through_s, x_tile, o.s2, side);
        if (TARGET) begin_product<false, false, true>(through_m, x_tile, o.m2, side);
        end_products();
        settle(scores), settle(through_w), settle(through_s), settle(through_m);
        if (i + 2 < SPLIT) {
            tiles_ready();
            if (threadIdx.x == 0) fetch_slice(i + 2);
        }
    }
    Fragment z;
    if (DUAL) {
        __syncthreads();
        store_tile(x_tile, packed(times(scores, coefficients)));
        tiles_ready();
        begin_product<false, false, false>(z, x_tile, u2_tile, side);
        end_products();
        settle(z);
        scale_rows(through_w, A);
        add(z, through_w);
    } else {
        z = through_w;
    }
    if (SURPRISED) {
        scale_rows(through_s, F);
        add(z, through_s);
    }
    if (TARGET) add(z, through_m);

    float* sums = (float*)weighted_tile;
    if (NORM == 2) {
        float mean[2], inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) mean[r] = row_part(z, r);
        sum_rows(mean, sums);
        FOR_EACH z.f[j][r] -= mean[r >> 1] * (1.f / TILE);
#pragma unroll
        for (int r = 0; r < 2; ++r) inverse[r] = row_part(times(z, z), r);
        sum_rows(inverse, sums);
#pragma unroll
        for (int r = 0; r < 2; ++r) inverse[r] = rsqrtf(inverse[r] * (1.f / TILE) + eps);
        scale_rows(z, inverse);
        if (KEEP) {
            store_rows(Z + cell * NUMBERS, TILE, TILE, packed(z));
            if ((lane_id() & 3) == 0 && threadIdx.x < THREADS / 2)
#pragma unroll
                for (int r = 0; r < 2; ++r) R[cell * TILE + own_row() + 8 * r] = inverse[r];
        }
        const float *gamma = GAMMA + h * TILE, *beta = BETA + h * TILE;
        FOR_EACH {
            int c = own_column(j) + (r & 1);
            z.f[j][r] = gamma[c] * z.f[j][r] + beta[c];
        }
    }
    if (NORM > 0) add(z, load_tile(q_tile));
    store_rows(Y + b * yb + h * yh + (long)n * TILE * yt, yt, rest, packed(z));
}
