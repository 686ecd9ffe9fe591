// The gradient of the writes, last chunk first: `write_backward_kernel` of ../write.py for heads and chunks
// of 64 in bfloat16. Programs, sums over them and order in memory as in write.cu. G_STATES, G_TARGETS_READ,
// G_U1 and G_X2, what the reads of each chunk add, are fragments.
//
// The gradients of keys, coefficients and targets are made here too, for all they need is at hand: of the
// keys each program's part as a fragment, of the coefficients each program's parts (sums over a half of the
// columns, and over a warp), which write_gradients.cu adds up; of the targets a sum in shared memory, as a
// fragment of float32.

// g (a B) + e (a C), rows scaled by g and e. With `like` also the sums of its rows times those of a B and of
// a C.
template <bool TB, bool SUMS>
__device__ __forceinline__ Fragment through_steps(const char* a, const char* b, const char* c,
                                                  const float (&g)[2], const float (&e)[2], int side,
                                                  const char* like, float (&g_sums)[2], float (&e_sums)[2]) {
    Fragment x, y;
    begin_product<false, TB, false>(x, a, b, side);
    if (MOMENTUM) begin_product<false, TB, false>(y, a, c, side);
    Packed other;
    if (SUMS) other = load_tile(like);
    end_products();
    settle(x);
    if (SUMS) g_sums[0] += row_part(times(x, other), 0), g_sums[1] += row_part(times(x, other), 1);
    scale_rows(x, g);
    if (MOMENTUM) {
        settle(y);
        if (SUMS) e_sums[0] += row_part(times(y, other), 0), e_sums[1] += row_part(times(y, other), 1);
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
// float32 as a fragment, of global memory or shared.
__device__ __forceinline__ float4* wide_place(float* base, int j) {
    return (float4*)(base + (j >> 1) * (NUMBERS / 2) + threadIdx.x * 8 + (j & 1) * 4);
}
__device__ __forceinline__ void copy_wide(float* to, float* from) {
#pragma unroll
    for (int j = 0; j < 4; ++j) *wide_place(to, j) = *wide_place(from, j);
}
__device__ __forceinline__ float dot(const Fragment& x, const Packed& y) {
    float sum = 0.f;
    FOR_EACH sum += x.f[j][r] * at(y, j, r);
    return sum;
}

// Gradients of the state.
struct State {
    Fragment w1, w2, s1, s2;
};

extern "C" __global__ void __cluster_dims__(PROGRAMS, 1, 1) __launch_bounds__(THREADS, 1)
    write_backward_kernel(const bf16* K, const bf16* V, const float* ENDS, const float* LAST,
                          const bf16* STATES, const bf16* STEPS, const bf16* HIDDENS, const bf16* ZH,
                          const float* NORMS, const bf16* TARGETS, const float* GAMMA, const float* BETA,
                          const unsigned char* RESETS, const int* OPEN, const bf16* G_STATES,
                          const bf16* G_TARGETS_READ, const bf16* G_U1, const bf16* G_X2, const bf16* G_U2,
                          float* CARRIED, float* G_TARGETS, bf16* G_K_PARTS, float* G_ENDS_PARTS,
                          float* G_LAST_PARTS, float* G_STEPS, const float* G_ANCHOR, float* G_START, long kb,
                          long kt, long kh, long vb, long vt, long vh, int walks, int heads, int chunks,
                          int tokens, int first_chunk, int span, int first_walk, float scale,
                          float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    int rank = blockIdx.x % PROGRAMS, walk = blockIdx.x / PROGRAMS;
    int m = first_walk + walk;
    int b = m / heads, h = m % heads;
    char* end = shared;
    auto tiles = [&](int count) {
        char* first = end;
        end += count * TILE_BYTES;
        return first;
    };
    char *k_tile = tiles(1), *u_tile = tiles(1), *z2_tile = tiles(1), *x = tiles(1), *w2 = tiles(1),
         *dw1 = tiles(1);
    char *dw2 = tiles(1), *pulled = tiles(1), *u1 = tiles(1), *both_w1 = tiles(2), *m1 = end, *m2 = end,
         *ds1 = end;
    float* sums = (float*)end;
    if (TARGET) m1 = tiles(1), m2 = tiles(1), sums = (float*)tiles(4);
    char *ds2 = end, *s1 = end, *s2 = end;
    if (MOMENTUM) ds1 = tiles(1), ds2 = tiles(1), s1 = tiles(1), s2 = tiles(1);
    // What the reads give the state, and W1's target; W2's target lies where W1 of the chunk after did.
    const int given = READS ? PARTS : 2, to_targets = READS && TARGET;
    char *by_reads = tiles(PARTS), *by_reads_m1 = to_targets ? tiles(1) : end;
    float *inbox = (float*)tiles(2), *norm = (float*)end;
    u64* barriers = (u64*)(norm + 2 * TILE);
    Exchange exchange(inbox, barriers);
    Arrival operands = {barriers + 2, (4 + (MOMENTUM ? 2 : 0) + 1) * TILE_BYTES, 0};
    Arrival targets = {barriers + 3, 2 * TILE_BYTES, 0};
    Arrival reads = {barriers + 4, (given + 2 * to_targets) * TILE_BYTES, 0};

    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    float *carried = CARRIED + (long)m * PARTS * SIZE,
          *g_targets = G_TARGETS + (long)m * 2 * SIZE + rank * NUMBERS;
    long kind = (long)walks * span * SIZE;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    int first = rank * TILE, second = SIZE + rank * NUMBERS;
    State d;
    d.w1 = load_floats(carried + first, HIDDEN);
    d.w2 = load_floats(carried + second, TILE);
    if (MOMENTUM) {
        d.s1 = load_floats(carried + 2 * SIZE + first, HIDDEN);
        d.s2 = load_floats(carried + 2 * SIZE + second, TILE);
    }
    if (TARGET) copy_wide(sums, g_targets), copy_wide(sums + NUMBERS, g_targets + SIZE);
    int last = min(first_chunk + span, chunks) - 1;
    // What comes as tiles for chunk n, by thread 0: momentum, which is needed first, and the rest. W1 is
    // still in use when that of the next chunk comes.
    auto fetch_momentum = [&](int n) {
        const bf16* states = STATES + (((long)m * span + n - first_chunk) * PARTS * SPLIT + rank) * NUMBERS;
        expect(operands);
        if (MOMENTUM) {
            fetch(s1, states + 2 * SIZE, operands);
            fetch(s2, states + 3 * SIZE, operands);
        }
    };
    auto fetch_chunk = [&](int n) {
        long here = (long)m * span + n - first_chunk;
        const bf16* states = STATES + (here * PARTS * SPLIT + rank) * NUMBERS;
        fetch(x, HIDDENS + (here * SPLIT + rank) * NUMBERS, operands);
        fetch(u1, HIDDENS + 2 * kind + (here * SPLIT + rank) * NUMBERS, operands);
        fetch(both_w1 + (n & 1) * TILE_BYTES, states, operands);
        fetch(w2, states + SIZE, operands);
        fetch(u_tile, STEPS + here * NUMBERS, operands);
        expect(reads);
        for (int part = 0; part < given; ++part)
            fetch(by_reads + part * TILE_BYTES,
                  G_STATES + (here * PARTS * SPLIT + rank) * NUMBERS + part * SIZE, reads);
        if (to_targets) fetch(by_reads_m1, G_TARGETS_READ + (here * 2 * SPLIT + rank) * NUMBERS, reads);
    };
    // What chunk n needs besides, from memory to the cache.
    auto bring_chunk = [&](int n) {
        long here = (long)m * span + n - first_chunk, wide = (here * SPLIT + rank) * NUMBERS;
        bring(HIDDENS + wide);
        bring(HIDDENS + kind + wide);
        bring(HIDDENS + 2 * kind + wide);
        bring(HIDDENS + 3 * kind + wide);
        for (int part = 0; part < PARTS; ++part)
            bring(STATES + (here * PARTS * SPLIT + rank) * NUMBERS + part * SIZE);
        bring(STEPS + here * NUMBERS);
        bring(ENDS + ((long)m * chunks + n) * 2 * TILE, 2 * TILE * 4);
        bring(LAST + ((long)m * chunks + n) * 4, 16);
        bring(ZH + here * NUMBERS + rank * ROWS * TILE, ROWS * TILE * 2);
        if (NORM == 2) bring(NORMS + here * 2 * TILE, 2 * TILE * 4);
        if (READS) {
            bring(G_U1 + wide);
            bring(G_X2 + wide);
            bring(G_U2 + here * NUMBERS);
        }
    };
    Pieces keys = load_pieces(k_at + (long)last * TILE * kt, kt, tokens - last * TILE);
    if (threadIdx.x == 0) {
        prepare(operands), prepare(reads);
        if (TARGET) prepare(targets);
    }
    exchange.prepare_all();
    if (threadIdx.x == 0) fetch_momentum(last), fetch_chunk(last);
    if (TARGET) {
        if (threadIdx.x == 0) {
            const bf16* target = TARGETS + ((long)h * 2 * SPLIT + rank) * NUMBERS;
            expect(targets);
            fetch(m1, target, targets);
            fetch(m2, target + SIZE, targets);
        }
        await(targets);
    }

    for (int n = last; n >= first_chunk; --n) {
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        long wide = (here * SPLIT + rank) * NUMBERS;
        char *w1 = both_w1 + (n & 1) * TILE_BYTES, *by_reads_m2 = both_w1 + (~n & 1) * TILE_BYTES;
        Packed slope = load_fragment(HIDDENS + kind + wide), bend = load_fragment(HIDDENS + 3 * kind + wide),
               extra;
        if (READS) extra = load_fragment(G_U1 + wide);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        store_pieces(k_tile, keys);
        store_tile(dw1, packed(d.w1));
        store_tile(dw2, packed(d.w2));
        if (MOMENTUM) {
            store_tile(ds1, packed(d.s1));
            store_tile(ds2, packed(d.s2));
        }
        await(operands);
        tiles_ready();
        if (threadIdx.x == 0) {
            if (to_targets)
                fetch(by_reads_m2, G_TARGETS_READ + (here * 2 * SPLIT + rank) * NUMBERS + SIZE, reads);
            if (n > first_chunk) bring_chunk(n - 1);
        }

        // W' = A W + F S + .., S' = m S + ..: the gradients of A, F and m, each warp's part.
        {
            float g_last[3];
            Packed value = load_tile(w1), other = load_tile(w2);
            g_last[0] = dot(d.w1, value) + dot(d.w2, other);
            g_last[1] = g_last[2] = 0.f;
            if (MOMENTUM) {
                value = load_tile(s1), other = load_tile(s2);
                g_last[1] = dot(d.w1, value) + dot(d.w2, other);
                g_last[2] = dot(d.s1, value) + dot(d.s2, other);
            }
#pragma unroll
            for (int i = 0; i < 3; ++i) {
#pragma unroll
                for (int lanes = 1; lanes < 32; lanes *= 2)
                    g_last[i] += __shfl_xor_sync(0xffffffffu, g_last[i], lanes);
                if (lane_id() == 0)
                    G_LAST_PARTS[((here * SPLIT + rank) * (THREADS / 32) + (threadIdx.x >> 5)) * 4 + i] =
                        g_last[i];
            }
        }

        // The steps, as the state takes them and as the reads see them; u_1 = (u_2 W2^T) phi'(z_1).
        float g_sums[2] = {0.f, 0.f}, e_sums[2] = {0.f, 0.f};
        Packed g_z1;
        {
            Fragment g = through_steps<false, true>(k_tile, dw1, ds1, g_end, e_end, side, u1, g_sums, e_sums);
            if (READS) add(g, extra);
            g_z1 = packed(times(g, bend));
            store_tile(pulled, packed(times(g, slope)));
        }
        Fragment part = through_steps<false, false>(x, dw2, ds2, g_end, e_end, side, x, g_sums, e_sums);
        if (READS) extra = load_fragment(G_X2 + wide);
        tiles_ready();
        if (threadIdx.x == 0 && n > first_chunk) fetch_momentum(n - 1);
        begin_product<false, false, true>(part, pulled, w2, side);
        if (TARGET) begin_product<false, false, true>(part, pulled, m2, side);
        end_products();
        settle(part);
        exchange.send_part(rank, part);

        // While the parts travel: the gradient of x_2 from its steps, and what the state passes on.
        Fragment g = through_steps<true, true>(u_tile, dw2, ds2, g_end, e_end, side, x, g_sums, e_sums);
        if (READS) add(g, extra);
        // Of the rows that this program owns.
        uint2 rows_g_u[TURNS], rows_zh[TURNS];
        float inverses[TURNS], alongs[TURNS];
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int t = rank * ROWS + r * 16 + own;
            long narrow = here * NUMBERS + t * TILE + column;
            if (READS) rows_g_u[r] = *(const uint2*)(G_U2 + narrow);
            rows_zh[r] = *(const uint2*)(ZH + narrow);
            inverses[r] = NORM == 2 ? NORMS[here * 2 * TILE + t] : 1.f;
            alongs[r] = NORM == 2 ? NORMS[here * 2 * TILE + TILE + t] : 0.f;
        }
        await(reads);
        if (TARGET) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Packed read;
                if (READS) read = load_fragment((const bf16*)(i ? by_reads_m2 : by_reads_m1));
                const Fragment& after = i ? d.w2 : d.w1;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float4* sum = wide_place(sums + i * NUMBERS, j);
                    float4 more =
                        make_float4(after.f[j][0], after.f[j][1], after.f[j][2], after.f[j][3]) * (1.f - A);
                    if (READS)
                        more = more +
                               make_float4(at(read, j, 0), at(read, j, 1), at(read, j, 2), at(read, j, 3));
                    *sum = *sum + more;
                }
            }
        }
        if (MOMENTUM) {
            combine(d.s1, decay, F, d.w1);
            combine(d.s2, decay, F, d.w2);
            if (READS) add(d.s1, load_fragment((const bf16*)by_reads + 2 * NUMBERS));
            if (READS) add(d.s2, load_fragment((const bf16*)by_reads + 3 * NUMBERS));
        }
        multiply(d.w1, A);
        multiply(d.w2, A);
        add(d.w1, load_fragment((const bf16*)by_reads));
        add(d.w2, load_fragment((const bf16*)by_reads + NUMBERS));
        begin_product<true, false, true>(d.w2, pulled, u_tile, side);
        // Sums over the columns of a warp: those of the other half are another's.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* out = G_ENDS_PARTS + ((here * SPLIT + rank) * 2 + (threadIdx.x >> 7)) * 2 * TILE +
                         own_row() + 8 * r;
            float by_w = warp_sum_of_four(g_sums[r]), by_s = MOMENTUM ? warp_sum_of_four(e_sums[r]) : 0.f;
            if ((lane_id() & 3) == 0) out[0] = by_w, out[TILE] = by_s;
        }
        end_products();
        settle(d.w2);
        exchange.await_parts();

        // u_2 from z_2, in the rows that this program owns.
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int row = r * 16 + own, t = rank * ROWS + row;
            long narrow = here * NUMBERS + t * TILE + column;
            float4 g_u = exchange.sum_of_row(row, column);
            if (READS) g_u = g_u + four(rows_g_u[r]);
            *(float4*)(G_STEPS + narrow) = g_u;
            float4 zh = four(rows_zh[r]), gamma = all_of(1.f), beta = all_of(0.f);
            float inverse = inverses[r];
            if (NORM == 2)
                gamma = *(const float4*)(norm + column), beta = *(const float4*)(norm + TILE + column);
            float4 weighted = through_norm(g_u * -1.f, zh, inverse), f = zh, v = zh;
            if (LOSS == 2) {
                v = all_of(0.f);
                if (n * TILE + t < tokens)
                    v = four(*(const uint2*)(v_at + (long)(n * TILE + t) * vt + column));
                f = head(load_four(k_tile, t, column), zh, gamma, beta);
            }
            float4 g_z = output_gradient(weighted * gamma, f, v, scale, threshold);
            if (NORM == 2) {
                float along = alongs[r], share = inverse * (1.f / TILE);
                float4 u = load_four(u_tile, t, column);
                float4 by = zh * row_sum(g_u * u) + weighted * along + u * row_sum(g_u * zh);
                g_z = through_norm(g_z * gamma, zh, inverse) - by * share;
            }
            exchange.send_made(z2_tile, t, column, pack_four(g_z));
        }
        // Again, for it is not worth its registers in between.
        slope = load_fragment(HIDDENS + kind + wide);
        exchange.await_made();

        // Of the keys, through the steps: (u_1 dW1^T) and (u_1 dS1^T), rows scaled by the coefficients.
        Fragment g_k, by_s;
        begin_product<false, true, true>(g, z2_tile, w2, side);
        if (TARGET) begin_product<false, true, true>(g, z2_tile, m2, side);
        begin_product<true, false, true>(d.w2, x, z2_tile, side);
        begin_product<false, true, false>(g_k, u1, dw1, side);
        if (MOMENTUM) begin_product<false, true, false>(by_s, u1, ds1, side);
        if (n > first_chunk) keys = load_pieces(k_at + (long)(n - 1) * TILE * kt, kt, TILE);
        end_products();
        settle(g), settle(d.w2), settle(g_k);
        scale_rows(g_k, g_end);
        if (MOMENTUM) {
            settle(by_s);
            scale_rows(by_s, e_end);
            add(g_k, by_s);
        }
        FOR_EACH g.f[j][r] = at(g_z1, j, r) + g.f[j][r] * at(slope, j, r);
        // All have read what was pulled.
        store_tile(pulled, packed(g));
        tiles_ready();
        // And what comes as tiles, but W1; and what the reads gave.
        if (threadIdx.x == 0 && n > first_chunk) fetch_chunk(n - 1);
        begin_product<true, false, true>(d.w1, k_tile, pulled, side);
        begin_product<false, true, true>(g_k, pulled, w1, side);
        if (TARGET) begin_product<false, true, true>(g_k, pulled, m1, side);
        end_products();
        settle(d.w1), settle(g_k);
        store_fragment(G_K_PARTS + wide, packed(g_k));
        if (HAS_OPEN && n == OPEN[b]) {
            const float* anchor = G_ANCHOR + (long)m * 2 * SIZE;
            add(d.w1, load_floats(anchor + first, HIDDEN));
            add(d.w2, load_floats(anchor + second, TILE));
        }
        if (HAS_RESETS && RESETS[b * chunks + n]) {
            float* start = G_START + (long)m * PARTS * SIZE;
            add_floats(start + first, HIDDEN, d.w1);
            add_floats(start + second, TILE, d.w2);
            clear(d.w1);
            clear(d.w2);
            if (MOMENTUM) {
                add_floats(start + 2 * SIZE + first, HIDDEN, d.s1);
                add_floats(start + 2 * SIZE + second, TILE, d.s2);
                clear(d.s1);
                clear(d.s2);
            }
        }
        __syncthreads();
    }
    store_floats(carried + first, HIDDEN, d.w1);
    store_floats(carried + second, TILE, d.w2);
    if (MOMENTUM) {
        store_floats(carried + 2 * SIZE + first, HIDDEN, d.s1);
        store_floats(carried + 2 * SIZE + second, TILE, d.s2);
    }
    if (TARGET) copy_wide(g_targets, sums), copy_wide(g_targets + SIZE, sums + NUMBERS);
}
