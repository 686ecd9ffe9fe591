// The writes of a two-layer memory, forward: `write_kernel` of ../write.py for heads and chunks of 64 in bfloat16.
//
// A cluster walks one sequence and head; each program has 64 columns of W1 and rows of W2, with their momentum, in
// registers from chunk to chunk. For z_2 each sends its part to the owners of the rows, and an owner sends the step u_2
// of its rows to all. W is never put together from what a state holds, D, and its target M: products take both.
//
// Order in memory, besides ../write.py's: STATES, STEPS, x_2 and u_1 of HIDDENS, and TARGETS [heads, 2, SPLIT] as tiles;
// phi'(z_1) and u_2 W2^T phi''(z_1) as fragments.

struct State {
    Fragment w1, w2, s1, s2;
};
__device__ __forceinline__ void load_state(State& x, const float* base, int s) {
    x.w1 = load_floats(base + s * TILE, HIDDEN);
    x.w2 = load_floats(base + SIZE + s * NUMBERS, TILE);
    if (MOMENTUM) {
        x.s1 = load_floats(base + 2 * SIZE + s * TILE, HIDDEN);
        x.s2 = load_floats(base + 3 * SIZE + s * NUMBERS, TILE);
    }
}
__device__ __forceinline__ void save_state(const State& x, float* base, int s) {
    store_floats(base + s * TILE, HIDDEN, x.w1);
    store_floats(base + SIZE + s * NUMBERS, TILE, x.w2);
    if (MOMENTUM) {
        store_floats(base + 2 * SIZE + s * TILE, HIDDEN, x.s1);
        store_floats(base + 3 * SIZE + s * NUMBERS, TILE, x.s2);
    }
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, BLOCKS) write_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const float* LAST, float* CHECKPOINTS, bf16* STATES,
    bf16* STEPS, bf16* HIDDENS, bf16* ZH, float* NORMS, const bf16* TARGETS, const float* GAMMA,
    const float* BETA, const float* START, const unsigned char* RESETS, const int* OPEN, float* ANCHOR,
    long kb, long kt, long kh, long vb, long vt, long vh, int walks, int heads, int chunks, int tokens,
    int first_chunk, int span, int interval, int rows, float eps, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    char *k_tile = shared, *u2_tile = k_tile + TILE_BYTES, *w1_tile = u2_tile + TILE_BYTES,
         *w2_tile = w1_tile + TILE_BYTES, *x_tile = w2_tile + TILE_BYTES, *xg_tile = x_tile + TILE_BYTES,
         *u_tile = xg_tile + TILE_BYTES, *end = u_tile + TILE_BYTES;
    char *m1_tile = end, *m2_tile = end + TILE_BYTES;
    if (TARGET) end += 2 * TILE_BYTES;
    char *xe_tile = end, *s1_tile = xe_tile + TILE_BYTES, *s2_tile = s1_tile + TILE_BYTES;
    if (MOMENTUM) end += 3 * TILE_BYTES;
    // u_1 by itself goes where nothing is read any more then.
    char *plain_tile = MOMENTUM ? s1_tile : w1_tile, *ue_tile = MOMENTUM ? s2_tile : w1_tile;
    float *inbox = (float*)end, *norm = inbox + NUMBERS;
    Arrival parts = {(u64*)(norm + 2 * TILE), INBOX_BYTES, 0}, steps = {parts.barrier + 1, TILE_BYTES, 0};
    Arrival targets = {parts.barrier + 2, 2 * TILE_BYTES, 0};

    int s = blockIdx.x % SPLIT, walk = blockIdx.x / SPLIT, m = walk % walks, piece = walk / walks;
    int b = m / heads, h = m % heads;
    int begin = first_chunk + piece * rows, stop = min(min(begin + rows, first_chunk + span), chunks);
    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    // Of the rows whose sums this program owns.
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;

    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    State state;
    load_state(state, CHECKPOINTS + ((long)(begin / interval) * walks + m) * PARTS * SIZE, s);
    Pieces next = load_pieces(k_at + (long)begin * TILE * kt, kt, tokens - begin * TILE);
    if (TARGET && threadIdx.x == 0) prepare(targets);
    prepare_walk(parts, steps);
    if (TARGET) {
        if (threadIdx.x == 0) {
            expect(targets);
            fetch(m1_tile, TARGETS + ((long)h * 2 * SPLIT + s) * NUMBERS, targets);
            fetch(m2_tile, TARGETS + ((long)h * 2 * SPLIT + SPLIT + s) * NUMBERS, targets);
        }
        await(targets);
    }

    for (int n = begin; n < stop; ++n) {
        if (HAS_RESETS && RESETS[b * chunks + n]) load_state(state, START + (long)h * PARTS * SIZE, s);
        if (SAVE && n % interval == 0)
            save_state(state, CHECKPOINTS + ((long)(n / interval) * walks + m) * PARTS * SIZE, s);
        if (HAS_OPEN && n == OPEN[b]) {
            float* anchor = ANCHOR + (long)m * 2 * SIZE;
            store_floats(anchor + s * TILE, HIDDEN, state.w1);
            store_floats(anchor + SIZE + s * NUMBERS, TILE, state.w2);
        }
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        store_pieces(k_tile, next);
        store_tile(w1_tile, packed(state.w1));
        store_tile(w2_tile, packed(state.w2));
        if (MOMENTUM) {
            store_tile(s1_tile, packed(state.s1));
            store_tile(s2_tile, packed(state.s2));
        }
        tiles_ready();
        bf16* out = STATES + (here * PARTS * SPLIT + s) * NUMBERS;
        if (threadIdx.x == 0) {
            send(out, w1_tile);
            send(out + SIZE, w2_tile);
            if (MOMENTUM) {
                send(out + 2 * SIZE, s1_tile);
                send(out + 3 * SIZE, s2_tile);
            }
        }
        Fragment z;
        begin_product<false, false, false>(z, k_tile, w1_tile, side);
        if (TARGET) begin_product<false, false, true>(z, k_tile, m1_tile, side);
        // What comes from memory is under way meanwhile.
        uint2 values[TURNS];
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int t = n * TILE + s * ROWS + r * 16 + own;
            values[r] = make_uint2(0, 0);
            if (t < tokens) values[r] = *(const uint2*)(v_at + t * vt + column);
        }
        if (n + 1 < stop) next = load_pieces(k_at + (long)(n + 1) * TILE * kt, kt, tokens - (n + 1) * TILE);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        end_products();
        settle(z);

        Packed x, slope, curvature;
        {
            Fragment slopes, curvatures;
            FOR_EACH activate(z.f[j][r], z.f[j][r], slopes.f[j][r], curvatures.f[j][r]);
            x = packed(z);
            slope = packed(slopes);
            if (!SAVE) curvature = packed(curvatures);
        }
        store_tile(x_tile, x);
        store_tile(xg_tile, packed(rows_scaled(x, g_end)));
        if (MOMENTUM) store_tile(xe_tile, packed(rows_scaled(x, e_end)));
        tiles_ready();
        begin_product<false, false, false>(z, x_tile, w2_tile, side);
        if (TARGET) begin_product<false, false, true>(z, x_tile, m2_tile, side);
        long kind = (long)walks * span * SIZE;
        bf16* hidden = HIDDENS + (here * SPLIT + s) * NUMBERS;
        if (!SAVE) {
            if (threadIdx.x == 0) send(hidden, x_tile);
            store_fragment(hidden + kind, slope);
        }
        end_products();
        settle(z);
        push_rows(inbox, parts, s, z);
        if (threadIdx.x == 0) sent();
        await_and_expect(parts);

#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int row = r * 16 + own, t = s * ROWS + row;
            float4 gamma = all_of(1.f), beta = all_of(0.f), v = four(values[r]), k = load_four(k_tile, t, column);
            if (NORM == 2) gamma = *(const float4*)(norm + column), beta = *(const float4*)(norm + TILE + column);
            float inverse;
            float4 zh = standardise(gather_row(inbox, row, column), eps, inverse);
            float4 e = loss_error(head(k, zh, gamma, beta), v, scale, threshold) * gamma;
            float along = row_sum(e * zh);
            uint2 u = pack_four(through_norm(e, zh, inverse), -1.f);
            push_everywhere(u2_tile, steps, t, column, u);
            *(uint2*)((char*)(STEPS + here * NUMBERS) + tile_byte(t, column)) = u;
            if (!SAVE) {
                *(uint2*)(ZH + here * NUMBERS + t * TILE + column) = pack_four(zh);
                if (column == 0) {
                    NORMS[here * 2 * TILE + t] = inverse;
                    NORMS[here * 2 * TILE + TILE + t] = along;
                }
            }
        }
        await_and_expect(steps);
        arrived();

        begin_product<false, true, false>(z, u2_tile, w2_tile, side);
        if (TARGET) begin_product<false, true, true>(z, u2_tile, m2_tile, side);
        end_products();
        settle(z);
        if (!SAVE) store_fragment(hidden + 3 * kind, packed(times(z, curvature)));
        Packed u = packed(times(z, slope));
        store_tile(u_tile, packed(rows_scaled(u, g_end)));
        if (MOMENTUM) store_tile(ue_tile, packed(rows_scaled(u, e_end)));
        if (!SAVE) store_tile(plain_tile, u);
        tiles_ready();
        if (!SAVE && threadIdx.x == 0) send(hidden + 2 * kind, plain_tile);
        if (MOMENTUM) {
            combine(state.w1, A, F, state.s1);
            combine(state.w2, A, F, state.s2);
            multiply(state.s1, decay);
            multiply(state.s2, decay);
            begin_product<true, false, true>(state.s1, k_tile, ue_tile, side);
            begin_product<true, false, true>(state.s2, xe_tile, u2_tile, side);
        } else {
            multiply(state.w1, A);
            multiply(state.w2, A);
        }
        begin_product<true, false, true>(state.w1, k_tile, u_tile, side);
        begin_product<true, false, true>(state.w2, xg_tile, u2_tile, side);
        if (threadIdx.x == 0) sent();
        end_products();
        settle(state.w1), settle(state.w2);
        if (MOMENTUM) settle(state.s1), settle(state.s2);
        __syncthreads();
    }
    if (SAVE)
        save_state(state, CHECKPOINTS + ((long)((stop + interval - 1) / interval) * walks + m) * PARTS * SIZE, s);
}
