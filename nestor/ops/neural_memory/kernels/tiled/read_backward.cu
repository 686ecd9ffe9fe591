// The gradient of the reads: `read_backward_kernel` of ../read.py for heads and chunks of 64 in bfloat16, reads
// inclusive. One program a chunk of one sequence and head; it walks the hidden width in SPLIT slices of 64, the
// operands of the next slice on their way while it works on one.
// Row scales (A, F, 1 - A) are applied to sums where they can be, and to q and g_z once where they cannot.

static const int HIDDEN = SPLIT * TILE;
static const int SIZE = TILE * HIDDEN;
static const int PARTS = MOMENTUM ? 4 : 2;
static const int OPERANDS = 4 + (MOMENTUM ? 2 : 0) + (TARGET ? 2 : 0);

// One slice's operands, in the order of their tiles.
struct Slice {
    char *w1, *w2, *x2, *u1, *s1, *s2, *m1, *m2;
};
__device__ __forceinline__ Slice slice_at(char* tiles) {
    Slice x;
    x.w1 = tiles, x.w2 = x.w1 + TILE_BYTES, x.x2 = x.w2 + TILE_BYTES, x.u1 = x.x2 + TILE_BYTES;
    x.s1 = x.u1 + TILE_BYTES, x.s2 = x.s1 + TILE_BYTES;
    x.m1 = x.u1 + (MOMENTUM ? 3 : 1) * TILE_BYTES, x.m2 = x.m1 + TILE_BYTES;
    return x;
}
__device__ __forceinline__ float row_product(const Packed& x, const Fragment& y, int h) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += at(x, j, 2 * h) * y.f[j][2 * h] + at(x, j, 2 * h + 1) * y.f[j][2 * h + 1];
    return sum;
}
__device__ __forceinline__ Fragment load_tile(const char* tile) {
    Packed x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        x.w[j][0] = *(const u32*)(tile + tile_byte(own_row(), own_column(j)));
        x.w[j][1] = *(const u32*)(tile + tile_byte(own_row() + 8, own_column(j)));
    }
    return unpacked(x);
}
__device__ __forceinline__ Fragment product_of(const Fragment& x, const Fragment& y) {
    Fragment z;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) z.f[j][r] = x.f[j][r] * y.f[j][r];
    return z;
}
__device__ __forceinline__ void store_four(char* tile, int row, int column, float4 x, float by) {
    *(uint2*)(tile + tile_byte(row, column)) = make_uint2(pack(x.x * by, x.y * by), pack(x.z * by, x.w * by));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) read_backward_kernel(
    const bf16* Q, const bf16* K, const float* ROWS_AT, const float* G, const bf16* STATES, const bf16* STEPS,
    const bf16* HIDDENS, const bf16* TARGETS, const float* GAMMA, const bf16* Z, const float* R, const bf16* G_Y,
    bf16* G_Q, bf16* G_K, float* G_ROWS, float* G_G, bf16* G_STATES, bf16* G_TARGETS, bf16* G_U1, bf16* G_X2,
    bf16* G_U2, float* G_NORM, long qb, long qt, long qh, long kb, long kt, long kh, long yb, long yt, long yh,
    long gb, long gt, long gh, int walks, int heads, int chunks, int tokens, int first_chunk, int span) {
    extern __shared__ __align__(1024) char shared[];
    char *q_tile = shared, *aq_tile = q_tile + TILE_BYTES, *fq_tile = aq_tile + TILE_BYTES,
         *mq_tile = fq_tile + TILE_BYTES, *gz_tile = mq_tile + TILE_BYTES, *agz_tile = gz_tile + TILE_BYTES,
         *fgz_tile = agz_tile + TILE_BYTES, *mgz_tile = fgz_tile + TILE_BYTES, *weighted_tile = mgz_tile + TILE_BYTES,
         *scores_tile = weighted_tile + TILE_BYTES, *x_tile = scores_tile + TILE_BYTES, *z_tile = x_tile + TILE_BYTES,
         *operands = z_tile + TILE_BYTES;

    int at_chunk = blockIdx.x, n = first_chunk + at_chunk, m = blockIdx.y, b = m / heads, h = m % heads;
    long here = (long)m * span + at_chunk, cell = (long)m * chunks + n, wide = here * TILE * HIDDEN;
    long kind = (long)walks * span * TILE * HIDDEN;
    int rest = tokens - n * TILE;
    const bf16 *states = STATES + here * PARTS * SIZE, *targets = TARGETS + (long)h * 2 * SIZE;
    const bf16* k_at = K + b * kb + h * kh + (long)n * TILE * kt;
    const float* g_at = G + cell * TILE * TILE;

    auto fetch = [&](int i) {
        Slice x = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        int first = i * TILE, second = SIZE + i * TILE * TILE;
        copy_pieces(x.w1, states + first, HIDDEN);
        copy_pieces(x.w2, states + second, TILE);
        copy_pieces(x.x2, HIDDENS + wide + first, HIDDEN);
        copy_pieces(x.u1, HIDDENS + wide + 2 * kind + first, HIDDEN);
        if (MOMENTUM) {
            copy_pieces(x.s1, states + 2 * SIZE + first, HIDDEN);
            copy_pieces(x.s2, states + 2 * SIZE + second, TILE);
        }
        if (TARGET) {
            copy_pieces(x.m1, targets + first, HIDDEN);
            copy_pieces(x.m2, targets + second, TILE);
        }
        end_copies();
    };
    fetch(0);

    // g_z, and q and g_z with their scales: sixteen threads to a row.
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    {
        Pieces keys = load_pieces(k_at, kt, rest);
        const bf16 *q_at = Q + b * qb + h * qh, *y_at = G_Y + b * yb + h * yh;
        float4 gamma = make_float4(1.f, 1.f, 1.f, 1.f), by_norm = make_float4(0.f, 0.f, 0.f, 0.f), by_shift = by_norm;
        if (NORM == 2) gamma = *(const float4*)(GAMMA + h * TILE + column);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            int t = r * 16 + own;
            uint2 qw = make_uint2(0, 0), yw = qw;
            if (t < rest) {
                qw = *(const uint2*)(q_at + (n * TILE + t) * qt + column);
                yw = *(const uint2*)(y_at + (n * TILE + t) * yt + column);
            }
            float4 q = four(qw.x, qw.y), g = four(yw.x, yw.y);
            float A = ROWS_AT[cell * 3 * TILE + t], F = ROWS_AT[cell * 3 * TILE + TILE + t];
            if (NORM == 2) {
                uint2 w = *(const uint2*)(Z + cell * TILE * TILE + t * TILE + column);
                float4 zh = four(w.x, w.y);
                float inverse = R[cell * TILE + t];
                by_norm = make_float4(by_norm.x + g.x * zh.x, by_norm.y + g.y * zh.y, by_norm.z + g.z * zh.z,
                                      by_norm.w + g.w * zh.w);
                by_shift = make_float4(by_shift.x + g.x, by_shift.y + g.y, by_shift.z + g.z, by_shift.w + g.w);
                g = make_float4(g.x * gamma.x, g.y * gamma.y, g.z * gamma.z, g.w * gamma.w);
                float mean = row_sum(g) * (1.f / TILE);
                float part = row_sum(g.x * zh.x + g.y * zh.y + g.z * zh.z + g.w * zh.w) * (1.f / TILE);
                g = make_float4((g.x - mean - zh.x * part) * inverse, (g.y - mean - zh.y * part) * inverse,
                                (g.z - mean - zh.z * part) * inverse, (g.w - mean - zh.w * part) * inverse);
            }
            store_four(q_tile, t, column, q, 1.f);
            store_four(aq_tile, t, column, q, A);
            store_four(gz_tile, t, column, g, 1.f);
            store_four(agz_tile, t, column, g, A);
            if (MOMENTUM) {
                store_four(fq_tile, t, column, q, F);
                store_four(fgz_tile, t, column, g, F);
            }
            if (TARGET) {
                store_four(mq_tile, t, column, q, 1.f - A);
                store_four(mgz_tile, t, column, g, 1.f - A);
            }
        }
        if (NORM == 2) {
            // The sums over the tokens, through the tiles of the next step.
            float* sums = (float*)weighted_tile;
            *(float4*)(sums + own * TILE + column) = by_norm;
            *(float4*)(sums + (16 + own) * TILE + column) = by_shift;
            __syncthreads();
            if (threadIdx.x < 2 * TILE) {
                float sum = 0.f;
                for (int r = 0; r < 16; ++r) sum += sums[((threadIdx.x >> 6) * 16 + r) * TILE + (threadIdx.x & 63)];
                G_NORM[here * 2 * TILE + threadIdx.x] = sum;
            }
        }
        store_pieces(x_tile, keys);
        store_pieces(z_tile, load_pieces(STEPS + here * TILE * TILE, TILE, TILE));
    }
    tiles_ready();
    {
        Fragment x, y, coefficients = load_floats(g_at, TILE);
        begin_product<false, true, false>(x, q_tile, x_tile);
        begin_product<false, true, false>(y, gz_tile, z_tile);
        end_products();
        settle(x);
        settle(y);
        store_tile(weighted_tile, packed(product_of(x, coefficients)));
        store_tile(scores_tile, packed(product_of(y, coefficients)));
    }
    float A[2], F[2], g_A[2] = {0.f, 0.f}, g_F[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        A[r] = ROWS_AT[cell * 3 * TILE + own_row() + 8 * r];
        F[r] = ROWS_AT[cell * 3 * TILE + TILE + own_row() + 8 * r];
    }
    // Sums over the slices: x x_2^T, g_z1 u_1^T, and g_z1 times each of the first layer's weights.
    Fragment scores, g_weighted, through_w, through_s, through_m;
    clear(scores), clear(g_weighted), clear(through_w), clear(through_s), clear(through_m);

    for (int i = 0; i < SPLIT; ++i) {
        if (i + 1 < SPLIT) {
            fetch(i + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        tiles_ready();
        Slice o = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        {
            Fragment z, zw, zs, g, gw, gs;
            begin_product<false, false, false>(z, weighted_tile, o.u1);
            begin_product<false, false, false>(zw, q_tile, o.w1);
            if (MOMENTUM) begin_product<false, false, false>(zs, q_tile, o.s1);
            if (TARGET) begin_product<false, false, true>(z, q_tile, o.m1);
            begin_product<false, false, false>(g, scores_tile, o.x2);
            begin_product<false, true, false>(gw, gz_tile, o.w2);
            if (MOMENTUM) begin_product<false, true, false>(gs, gz_tile, o.s2);
            if (TARGET) begin_product<false, true, true>(g, gz_tile, o.m2);
            end_products();
            settle(z), settle(zw), settle(g), settle(gw);
            if (MOMENTUM) settle(zs), settle(gs);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    float value, curvature;
                    z.f[j][r] += A[r >> 1] * zw.f[j][r];
                    g.f[j][r] += A[r >> 1] * gw.f[j][r];
                    if (MOMENTUM) z.f[j][r] += F[r >> 1] * zs.f[j][r], g.f[j][r] += F[r >> 1] * gs.f[j][r];
                    activate(z.f[j][r], value, z.f[j][r], curvature);
                    g_A[r >> 1] += value * gw.f[j][r];
                    if (MOMENTUM) g_F[r >> 1] += value * gs.f[j][r];
                    g.f[j][r] *= z.f[j][r];
                    z.f[j][r] = value;
                }
            store_tile(x_tile, packed(z));
            store_tile(z_tile, packed(g));
        }
        tiles_ready();
        bf16* out = G_STATES + here * PARTS * SIZE;
        bf16* more = G_TARGETS + here * 2 * SIZE;
        int first = i * TILE, second = SIZE + i * TILE * TILE;
        {
            Fragment x1, x2, x3, x4;
            begin_product<false, true, true>(scores, x_tile, o.x2);
            begin_product<false, true, true>(g_weighted, z_tile, o.u1);
            begin_product<false, true, true>(through_w, z_tile, o.w1);
            if (MOMENTUM) begin_product<false, true, true>(through_s, z_tile, o.s1);
            if (TARGET) begin_product<false, true, true>(through_m, z_tile, o.m1);
            begin_product<true, false, false>(x1, x_tile, agz_tile);
            begin_product<true, false, false>(x2, aq_tile, z_tile);
            begin_product<true, false, false>(x3, scores_tile, x_tile);
            begin_product<true, false, false>(x4, weighted_tile, z_tile);
            end_products();
            settle(scores), settle(g_weighted), settle(through_w), settle(through_s), settle(through_m);
            settle(x1), settle(x2), settle(x3), settle(x4);
            store_global(out + second, TILE, packed(x1));
            store_global(out + first, HIDDEN, packed(x2));
            store_global(G_X2 + wide + first, HIDDEN, packed(x3));
            store_global(G_U1 + wide + first, HIDDEN, packed(x4));
        }
        {
            Fragment x1, x2, x3, x4;
            if (MOMENTUM) {
                begin_product<true, false, false>(x1, x_tile, fgz_tile);
                begin_product<true, false, false>(x2, fq_tile, z_tile);
            }
            if (TARGET) {
                begin_product<true, false, false>(x3, x_tile, mgz_tile);
                begin_product<true, false, false>(x4, mq_tile, z_tile);
            }
            end_products();
            if (MOMENTUM) {
                settle(x1), settle(x2);
                store_global(out + 2 * SIZE + second, TILE, packed(x1));
                store_global(out + 2 * SIZE + first, HIDDEN, packed(x2));
            }
            if (TARGET) {
                settle(x3), settle(x4);
                store_global(more + second, TILE, packed(x3));
                store_global(more + first, HIDDEN, packed(x4));
            }
        }
        __syncthreads();
    }

    // What needs k and u_2 again, and the gradients of the coefficients and of q.
    store_pieces(x_tile, load_pieces(k_at, kt, rest));
    store_pieces(z_tile, load_pieces(STEPS + here * TILE * TILE, TILE, TILE));
    {
        Fragment coefficients = load_floats(g_at, TILE);
        store_tile(scores_tile, packed(product_of(scores, coefficients)));
        store_tile(weighted_tile, packed(product_of(g_weighted, coefficients)));
    }
    tiles_ready();
    Fragment qk, zu, by_k, by_q, by_z;
    begin_product<false, true, false>(qk, q_tile, x_tile);
    begin_product<false, true, false>(zu, gz_tile, z_tile);
    begin_product<false, false, false>(by_k, weighted_tile, x_tile);
    begin_product<true, false, false>(by_q, weighted_tile, q_tile);
    begin_product<true, false, false>(by_z, scores_tile, gz_tile);
    end_products();
    settle(qk), settle(zu), settle(by_k), settle(by_q), settle(by_z);
    store_global(G_U2 + here * TILE * TILE, TILE, packed(by_z));
    store_global(G_K + here * TILE * TILE, TILE, packed(by_q));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) qk.f[j][r] = scores.f[j][r] * zu.f[j][r] + qk.f[j][r] * g_weighted.f[j][r];
    store_floats(G_G + here * TILE * TILE, TILE, qk);

    Fragment q = load_tile(q_tile);
    Packed qp = packed(q);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        g_A[r] += row_product(qp, through_w, r);
        if (MOMENTUM) g_F[r] += row_product(qp, through_s, r);
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            g_A[r] += __shfl_xor_sync(0xffffffffu, g_A[r], d);
            g_F[r] += __shfl_xor_sync(0xffffffffu, g_F[r], d);
        }
    }
    // Two warps share a row.
    float* sums = (float*)operands;
    if ((lane_id() & 3) == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = own_row() + 8 * r, side = threadIdx.x >> 7;
            sums[side * TILE + row] = g_A[r];
            sums[(2 + side) * TILE + row] = g_F[r];
        }
    __syncthreads();
    if (threadIdx.x < 2 * TILE) {
        int part = threadIdx.x >> 6, row = threadIdx.x & 63;
        G_ROWS[here * 2 * TILE + threadIdx.x] = sums[2 * part * TILE + row] + sums[(2 * part + 1) * TILE + row];
    }
    scale_rows(through_w, A);
    add(by_k, through_w);
    if (MOMENTUM) {
        scale_rows(through_s, F);
        add(by_k, through_s);
    }
    if (TARGET) add(by_k, through_m);
    const bf16* y_at = G_Y + b * yb + h * yh + (long)n * TILE * yt;
    bf16* q_out = G_Q + b * gb + h * gh + (long)n * TILE * gt;
    Packed g_q = packed(by_k);
    int first_column = warp_column() + 8 * (lane_id() & 3);
    if (NORM > 0) {
        Lines y;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = own_row() + 8 * r;
            y.row[r] = make_uint4(0, 0, 0, 0);
            if (row < rest) y.row[r] = *(const uint4*)(y_at + row * yt + first_column);
        }
        add(by_k, from_lines(y));
        g_q = packed(by_k);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = own_row() + 8 * r;
        u32 w[4] = {g_q.w[0][r], g_q.w[1][r], g_q.w[2][r], g_q.w[3][r]};
        turn(w);
        if (row < rest) *(uint4*)(q_out + row * gt + first_column) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}
