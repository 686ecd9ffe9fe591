// The gradient of the reads: `read_backward_kernel` of ../read.py for heads and chunks of 64 in bfloat16. One
// program a chunk of one sequence and head; it walks the hidden width in SPLIT slices of 64, the operands of
// the next slice on their way while it works on one. Without DUAL all queries see the weights at the chunk's
// start, and nothing but the gradients of q, of the state and of the norm is written. Row scales (A, F, 1 -
// A) are applied to sums where they can be, and to q and g_z once where they cannot.
//
// Order in memory as in write.cu and write_backward.cu; G_TARGETS and G_K as fragments.

static const bool SURPRISED = DUAL && MOMENTUM;  // whether queries see the momentum
static const bool LOSING = DUAL && TARGET;       // whether they see part of the way to the targets
static const int OPERANDS = 2 + (DUAL ? 2 : 0) + (SURPRISED ? 2 : 0) + (TARGET ? 2 : 0);

// One slice's operands, in the order of their tiles.
struct Slice {
    char *w1, *w2, *x2, *u1, *s1, *s2, *m1, *m2;
};
__device__ __forceinline__ Slice slice_at(char* tiles) {
    Slice x;
    x.w1 = tiles, x.w2 = x.w1 + TILE_BYTES, x.x2 = x.w2 + TILE_BYTES, x.u1 = x.x2 + TILE_BYTES;
    x.s1 = x.u1 + TILE_BYTES, x.s2 = x.s1 + TILE_BYTES;
    x.m1 = tiles + (OPERANDS - 2) * TILE_BYTES, x.m2 = x.m1 + TILE_BYTES;
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    read_backward_kernel(const bf16* Q, const bf16* K, const float* SCALES, const bf16* G,
                         const bf16* STATES, const bf16* STEPS, const bf16* HIDDENS, const bf16* TARGETS,
                         const float* GAMMA, const bf16* Z, const float* R, const bf16* G_Y, bf16* G_Q,
                         bf16* G_K, float* G_ROWS, bf16* G_G, bf16* G_STATES, bf16* G_TARGETS, bf16* G_U1,
                         bf16* G_X2, bf16* G_U2, float* G_NORM, long qb, long qt, long qh, long kb, long kt,
                         long kh, long yb, long yt, long yh, long gb, long gt, long gh, int walks, int heads,
                         int chunks, int tokens, int first_chunk, int span) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    char *q_tile = shared, *aq_tile = q_tile + TILE_BYTES, *fq_tile = aq_tile + TILE_BYTES,
         *mq_tile = fq_tile + TILE_BYTES, *gz_tile = mq_tile + TILE_BYTES, *agz_tile = gz_tile + TILE_BYTES,
         *fgz_tile = agz_tile + TILE_BYTES, *mgz_tile = fgz_tile + TILE_BYTES,
         *weighted_tile = mgz_tile + TILE_BYTES, *scores_tile = weighted_tile + TILE_BYTES,
         *x_tile = scores_tile + TILE_BYTES, *z_tile = x_tile + TILE_BYTES, *operands = z_tile + TILE_BYTES;
    u64* barriers = (u64*)(operands + 2 * OPERANDS * TILE_BYTES);
    Arrival slices[2] = {{barriers, OPERANDS * TILE_BYTES, 0}, {barriers + 1, OPERANDS * TILE_BYTES, 0}};
    Arrival step = {barriers + 2, TILE_BYTES, 0};

    int at_chunk = blockIdx.x, n = first_chunk + at_chunk, m = blockIdx.y, b = m / heads, h = m % heads;
    long here = (long)m * span + at_chunk, cell = (long)m * chunks + n, kind = (long)walks * span * SIZE;
    int rest = tokens - n * TILE;
    const bf16 *states = STATES + here * PARTS * SIZE, *targets = TARGETS + (long)h * 2 * SIZE;
    const bf16* hidden = HIDDENS + here * SIZE;
    const bf16* k_at = K + b * kb + h * kh + (long)n * TILE * kt;
    const bf16* g_at = G + cell * NUMBERS;

    // By thread 0.
    auto fetch_slice = [&](int i) {
        opaque(i);
        const Arrival& arrival = slices[i & 1];
        Slice x = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        int tile = i * NUMBERS;
        expect(arrival);
        fetch(x.w1, states + tile, arrival);
        fetch(x.w2, states + SIZE + tile, arrival);
        if (DUAL) {
            fetch(x.x2, hidden + tile, arrival);
            fetch(x.u1, hidden + 2 * kind + tile, arrival);
        }
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
            fetch(z_tile, STEPS + here * NUMBERS, step);
        }
        fetch_slice(0);
        if (SPLIT > 1) fetch_slice(1);
    }
    __syncthreads();

    Packed coefficients;
    if (DUAL) coefficients = load_rows(g_at, TILE, TILE);
    // g_z, and q and g_z with their scales: sixteen threads to a row.
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    {
        Pieces keys = load_pieces(k_at, kt, rest);
        const bf16 *q_at = Q + b * qb + h * qh, *y_at = G_Y + b * yb + h * yh;
        float4 gamma = all_of(1.f), by_norm = all_of(0.f), by_shift = by_norm;
        if (NORM == 2) gamma = *(const float4*)(GAMMA + h * TILE + column);
        // All from memory at once.
        uint2 qs[4], gs[4], zhs[4];
        float As[4], Fs[4], inverses[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            int t = r * 16 + own;
            qs[r] = gs[r] = zhs[r] = make_uint2(0, 0);
            As[r] = 1.f, Fs[r] = 0.f;
            if (t < rest) {
                qs[r] = *(const uint2*)(q_at + (n * TILE + t) * qt + column);
                gs[r] = *(const uint2*)(y_at + (n * TILE + t) * yt + column);
            }
            if (DUAL) As[r] = SCALES[cell * 3 * TILE + t], Fs[r] = SCALES[cell * 3 * TILE + TILE + t];
            if (NORM == 2) {
                zhs[r] = *(const uint2*)(Z + cell * NUMBERS + t * TILE + column);
                inverses[r] = R[cell * TILE + t];
            }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            int t = r * 16 + own;
            float4 q = four(qs[r]), g = four(gs[r]), zh = four(zhs[r]);
            float A = As[r], F = Fs[r];
            if (NORM == 2) {
                by_norm = by_norm + g * zh;
                by_shift = by_shift + g;
                g = through_norm(g * gamma, zh, inverses[r]);
            }
            store_four(q_tile, t, column, q);
            store_four(aq_tile, t, column, q, A);
            store_four(gz_tile, t, column, g);
            store_four(agz_tile, t, column, g, A);
            if (SURPRISED) {
                store_four(fq_tile, t, column, q, F);
                store_four(fgz_tile, t, column, g, F);
            }
            if (LOSING) {
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
                for (int r = 0; r < 16; ++r)
                    sum += sums[((threadIdx.x >> 6) * 16 + r) * TILE + (threadIdx.x & 63)];
                G_NORM[cell * 2 * TILE + threadIdx.x] = sum;
            }
        }
        if (DUAL) store_pieces(x_tile, keys);
    }
    if (DUAL) await(step);
    tiles_ready();
    if (DUAL) {
        Fragment x, y;
        begin_product<false, true, false>(x, q_tile, x_tile, side);
        begin_product<false, true, false>(y, gz_tile, z_tile, side);
        end_products();
        settle(x), settle(y);
        store_tile(weighted_tile, packed(times(x, coefficients)));
        store_tile(scores_tile, packed(times(y, coefficients)));
    }
    float A[2] = {1.f, 1.f}, F[2] = {0.f, 0.f}, g_A[2] = {0.f, 0.f}, g_F[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; DUAL && r < 2; ++r) {
        A[r] = SCALES[cell * 3 * TILE + own_row() + 8 * r];
        F[r] = SCALES[cell * 3 * TILE + TILE + own_row() + 8 * r];
    }
    // Sums over the slices: x x_2^T, g_z1 u_1^T, and g_z1 times each of the first layer's weights.
    Fragment scores, g_weighted, through_w, through_s, through_m;
    clear(scores), clear(g_weighted), clear(through_w), clear(through_s), clear(through_m);

#pragma unroll 1
    for (int i = 0; i < SPLIT; ++i) {
        if (i & 1)
            await(slices[1]);
        else
            await(slices[0]);
        tiles_ready();
        Slice o = slice_at(operands + (i & 1) * OPERANDS * TILE_BYTES);
        {
            Fragment z, g, gw, gs;
            if (DUAL) begin_product<false, false, false>(z, weighted_tile, o.u1, side);
            begin_product<false, false, DUAL>(z, aq_tile, o.w1, side);
            if (SURPRISED) begin_product<false, false, true>(z, fq_tile, o.s1, side);
            if (TARGET) begin_product<false, false, true>(z, q_tile, o.m1, side);
            if (DUAL) begin_product<false, false, false>(g, scores_tile, o.x2, side);
            begin_product<false, true, false>(gw, gz_tile, o.w2, side);
            if (SURPRISED) begin_product<false, true, false>(gs, gz_tile, o.s2, side);
            if (TARGET) begin_product<false, true, DUAL>(g, gz_tile, o.m2, side);
            if (!DUAL && !TARGET) clear(g);
            end_products();
            settle(z), settle(gw);
            if (DUAL || TARGET) settle(g);
            if (SURPRISED) settle(gs);
            FOR_EACH {
                float value, curvature;
                g.f[j][r] += A[r >> 1] * gw.f[j][r];
                if (SURPRISED) g.f[j][r] += F[r >> 1] * gs.f[j][r];
                activate(z.f[j][r], value, z.f[j][r], curvature);
                g_A[r >> 1] += value * gw.f[j][r];
                if (SURPRISED) g_F[r >> 1] += value * gs.f[j][r];
                g.f[j][r] *= z.f[j][r];
                z.f[j][r] = value;
            }
            store_tile(x_tile, packed(z));
            store_tile(z_tile, packed(g));
        }
        tiles_ready();
        bf16 *out = G_STATES + here * PARTS * SIZE + i * NUMBERS,
             *more = G_TARGETS + here * 2 * SIZE + i * NUMBERS;
        {
            Fragment x1, x2, x3, x4;
            if (DUAL) begin_product<false, true, true>(scores, x_tile, o.x2, side);
            if (DUAL) begin_product<false, true, true>(g_weighted, z_tile, o.u1, side);
            begin_product<false, true, true>(through_w, z_tile, o.w1, side);
            if (SURPRISED) begin_product<false, true, true>(through_s, z_tile, o.s1, side);
            if (TARGET) begin_product<false, true, true>(through_m, z_tile, o.m1, side);
            begin_product<true, false, false>(x1, x_tile, agz_tile, side);
            begin_product<true, false, false>(x2, aq_tile, z_tile, side);
            if (DUAL) begin_product<true, false, false>(x3, scores_tile, x_tile, side);
            if (DUAL) begin_product<true, false, false>(x4, weighted_tile, z_tile, side);
            end_products();
            settle(scores), settle(g_weighted), settle(through_w), settle(through_s), settle(through_m);
            settle(x1), settle(x2);
            // The slice's operands have been read by all after the next barrier.
            store_fragment(out + SIZE, packed(x1));
            store_fragment(out, packed(x2));
            if (DUAL) {
                settle(x3), settle(x4);
                store_fragment(G_X2 + here * SIZE + i * NUMBERS, packed(x3));
                store_fragment(G_U1 + here * SIZE + i * NUMBERS, packed(x4));
            }
        }
        if (SURPRISED || LOSING) {
            Fragment x1, x2, x3, x4;
            if (SURPRISED) {
                begin_product<true, false, false>(x1, x_tile, fgz_tile, side);
                begin_product<true, false, false>(x2, fq_tile, z_tile, side);
            }
            if (LOSING) {
                begin_product<true, false, false>(x3, x_tile, mgz_tile, side);
                begin_product<true, false, false>(x4, mq_tile, z_tile, side);
            }
            end_products();
            if (SURPRISED) {
                settle(x1), settle(x2);
                store_fragment(out + 3 * SIZE, packed(x1));
                store_fragment(out + 2 * SIZE, packed(x2));
            }
            if (LOSING) {
                settle(x3), settle(x4);
                store_fragment(more + SIZE, packed(x3));
                store_fragment(more, packed(x4));
            }
        }
        tiles_ready();
        if (threadIdx.x == 0 && i + 2 < SPLIT) fetch_slice(i + 2);
    }

    Fragment g_q;
    if (!DUAL) {
        g_q = through_w;
    } else {
        // What needs k and u_2 again, and the gradients of the coefficients.
        if (threadIdx.x == 0) {
            expect(step);
            fetch(z_tile, STEPS + here * NUMBERS, step);
        }
        store_pieces(x_tile, load_pieces(k_at, kt, rest));
        {
            coefficients = load_rows(g_at, TILE, TILE);
            store_tile(scores_tile, packed(times(scores, coefficients)));
            store_tile(weighted_tile, packed(times(g_weighted, coefficients)));
        }
        await(step);
        tiles_ready();
        {
            Fragment qk, zu;
            begin_product<false, true, false>(qk, q_tile, x_tile, side);
            begin_product<false, true, false>(zu, gz_tile, z_tile, side);
            end_products();
            settle(qk), settle(zu);
            FOR_EACH qk.f[j][r] = scores.f[j][r] * zu.f[j][r] + qk.f[j][r] * g_weighted.f[j][r];
            store_rows(G_G + cell * NUMBERS, TILE, TILE, packed(qk));
        }
        {
            Fragment by_q, by_z;
            begin_product<false, false, false>(g_q, weighted_tile, x_tile, side);
            begin_product<true, false, false>(by_q, weighted_tile, q_tile, side);
            begin_product<true, false, false>(by_z, scores_tile, gz_tile, side);
            end_products();
            settle(g_q), settle(by_q), settle(by_z);
            store_rows(G_U2 + here * NUMBERS, TILE, TILE, packed(by_z));
            store_fragment(G_K + here * NUMBERS, packed(by_q));
        }

        Packed q = load_tile(q_tile);
        float* sums = (float*)operands;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            g_A[r] += row_part(times(through_w, q), r);
            if (MOMENTUM) g_F[r] += row_part(times(through_s, q), r);
        }
        sum_rows(g_A, sums);
        sum_rows(g_F, sums);
        if ((lane_id() & 3) == 0 && threadIdx.x < THREADS / 2)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                G_ROWS[cell * 2 * TILE + own_row() + 8 * r] = g_A[r];
                G_ROWS[cell * 2 * TILE + TILE + own_row() + 8 * r] = g_F[r];
            }
        scale_rows(through_w, A);
        add(g_q, through_w);
        if (MOMENTUM) {
            scale_rows(through_s, F);
            add(g_q, through_s);
        }
    }
    if (TARGET) add(g_q, through_m);
    if (NORM > 0) add(g_q, load_rows(G_Y + b * yb + h * yh + (long)n * TILE * yt, yt, rest));
    store_rows(G_Q + b * gb + h * gh + (long)n * TILE * gt, gt, rest, packed(g_q));
}
