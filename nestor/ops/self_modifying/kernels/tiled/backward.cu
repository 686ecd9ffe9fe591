// The walk of ../backward.py for memories of 64 x 64, products in TF32.
//
// A program has one sequence and head, and each of its warps 16 columns of the memories: those of the
// gradient, and of that of the anchor, stay in its registers from the first tile to the last. Of k W, k gW
// and the like a warp makes its columns alone; what is a sum over columns it adds up over all that it does in
// a tile, and leaves as a part in shared memory. The last warp makes of the parts what tokens have alone,
// their steps and decays, while the others go on to the memories. Then the rows of keys and values are put
// together, and go through the memories that made them.

extern "C" __global__ void __launch_bounds__(THREADS, 1) walk_backward_kernel(
    const QueryInput* XQ, const KeyInput* XK, const ValueInput* XV, const GateInput* XG, const float* ETA,
    const float* ALPHA, const unsigned char* VALID, const unsigned char* RESETS, const unsigned char* CLOSES,
    const float* START, const float* BIAS_A, const float* K_OUT, const float* V_OUT, const float* ETA_OUT,
    const float* KEPT, const float* KEPT_ANCHOR, const float* ROWS, const float* SOLVES, const float* STEPS,
    const float* DECAYS, const float* LENGTHS, const float* G_Q_OUT, const float* G_K_OUT,
    const float* G_V_OUT, const float* G_ETA_OUT, const float* G_ALPHA_OUT, const float* G_Y,
    const float* G_AFTER, const float* G_ANCHOR_AFTER, float* SCRATCH, float* SCRATCH_ANCHORS,
    QueryInput* G_XQ, KeyInput* G_XK, ValueInput* G_XV, GateInput* G_XG, float* G_ETA, float* G_ALPHA,
    float* G_START, float* G_WEIGHTS, float* G_ANCHOR, float* G_BIAS_E, float* G_BIAS_A, int tokens,
    int heads, int chunks, float max_step, float horizon, float eps) {
    extern __shared__ __align__(1024) char shared[];
    // As a value that the compiler knows to be the warp's.
    const int warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
    const bool has_slice = warp < SLICES, has_gates = HAS_G && warp == GATES;
    const bool makes_queries = HAS_Q && warp >= FIRST_Q && warp < GATES;
    const long m = blockIdx.x, sequence = m / heads * tokens * heads + m % heads;
    const long stack = m * WIDTH * COLUMNS + 16 * warp;
    const int segments = (chunks + SEGMENT - 1) / SEGMENT;
    float* scratch = SCRATCH + (m * SEGMENT * TILES * SLICES + warp) * NUMBERS;
    float* scratch_anchors = SCRATCH_ANCHORS + (m * SEGMENT * SLICES + warp) * NUMBERS;

    const Parts parts = parts_at(shared);
    const Gates gates = {
        HAS_E ? ETA_OUT : ETA, ALPHA, BIAS_A + m, G_ETA_OUT, G_ALPHA_OUT, G_ETA, G_ALPHA, max_step, horizon};

    auto tile_of = [&](int first, int f) {
        Tile x;
        x.chunk = first + f / TILES, x.number = f % TILES;
        int t = x.chunk * CHUNK + x.number * TILE;
        x.rows = max(0, min(min(TILE, CHUNK - x.number * TILE), tokens - t));
        x.first = sequence + (long)t * heads, x.apart = heads;
        return x;
    };
    int first = 0, turn = 0;
    auto place = [&](int turn) { return STAGES == 2 ? turn : 0; };
    auto inputs_of = [&](int turn) { return inputs_at(shared + place(turn) * ROWS_BYTES); };
    auto tokens_of = [&](int turn) { return (float*)(shared + AT_TOKENS) + turn * KINDS * TILE; };
    auto weights_of = [&](int turn) {
        return (float*)(shared + AT_WEIGHTS) + place(turn) * SLICES * NUMBERS;
    };
    auto anchors_of = [&](int turn, const Tile& x) {
        if (!ANCHORED) return weights_of(turn);
        return (float*)(shared + AT_ANCHORS) + place(x.chunk & 1) * SLICES * NUMBERS;
    };

    // Of the inputs of a tile all, or only what the walk forward needs.
    auto bring = [&](int f, int turn, bool all) {
        const Tile x = tile_of(first, f);
        const Inputs to = inputs_of(turn);
        copy_rows(to.k, (const Key*)(HAS_K ? (const void*)K_OUT : XK), x);
        if (has_slice)
            copy_square(to.u + warp * TILE * PITCH, ROWS + x.first * COLUMNS + 16 * warp,
                        (long)heads * COLUMNS, x.rows);
        if (!all) return;
        copy_rows(to.v, (const Value*)(HAS_V ? (const void*)V_OUT : XV), x);
        if (HAS_K) copy_rows(to.xk, XK, x);
        if (HAS_V) copy_rows(to.xv, XV, x);
        if (HAS_Q || HAS_M) copy_rows(to.xq, XQ, x);
        if (HAS_G) copy_rows(to.xg, XG, x);
        if (HAS_M) copy_rows(to.g_y, G_Y, x);
        if (has_slice) {
            copy_block(weights_of(turn) + warp * NUMBERS, scratch + (long)f * SLICES * NUMBERS);
            if (ANCHORED && x.number == TILES - 1)
                copy_block(anchors_of(turn, x) + warp * NUMBERS,
                           scratch_anchors + (long)(x.chunk - first) * SLICES * NUMBERS);
        } else if (DGD) {
            copy_square(to.solve, SOLVES + ((m * chunks + x.chunk) * TILES + x.number) * TILE * TILE, TILE,
                        TILE);
        }
    };
    auto describe_tokens = [&](int f, int turn) {
        describe(tokens_of(turn), tile_of(first, f), STEPS, DECAYS, LENGTHS, VALID);
    };
    // Tile f is there, and if there is room the next one under way. alone: none was under way.
    auto begin = [&](int f, int next, bool alone, bool all) {
        if (STAGES == 1 || alone) {
            __syncthreads();
            bring(f, turn, all);
        }
        if (alone && !has_slice) describe_tokens(f, turn);
        end_copies();
        const Inputs x = inputs_of(turn);
        round_rows(x.k, CAP && all ? x.key_squares : nullptr);
        if (all) {
            round_rows(x.v, nullptr);
            if (HAS_K) round_rows(x.xk, nullptr);
            if (HAS_V) round_rows(x.xv, nullptr);
            if (HAS_Q || HAS_M) round_rows(x.xq, UNIT ? x.query_squares : nullptr);
            if (HAS_G) round_rows(x.xg, nullptr);
            if (HAS_M) round_rows(x.g_y, nullptr);
        }
        __syncthreads();
        if (next < 0) return;
        if (STAGES == 2) bring(next, turn ^ 1, all);
        if (!has_slice) describe_tokens(next, turn ^ 1);
    };

    // Gradients of the memory after a tile, and of its anchor.
    Quad g[8] = {}, h[8] = {}, (&of_anchor)[8] = ANCHORED ? h : g;
    float g_bias_e = 0.f, g_bias_a = 0.f;
    if (has_slice) {
        load_slice(g, G_AFTER + stack);
        if (OPEN) load_slice(h, G_ANCHOR_AFTER + stack);
    }
    for (int segment = segments - 1; segment >= 0; --segment) {
        first = segment * SEGMENT;
        const int count = (min(first + SEGMENT, chunks) - first) * TILES;

        // Forward again, for the memory before each tile and the anchor of each chunk, both rounded.
        Quad w[8], anchor[8];
        if (has_slice) {
            const long kept = (m * segments + segment) * WIDTH * COLUMNS + 16 * warp;
            load_slice(w, KEPT + kept);
            if (OPEN) load_slice(anchor, KEPT_ANCHOR + kept);
        }
        for (int f = 0;; ++f) {
            const Tile x = tile_of(first, f);
            if (has_slice) {
                if (x.number == 0) {
                    if (HAS_RESETS && RESETS[m * chunks + x.chunk]) {
                        load_slice(w, START + stack);
                        if (OPEN) load_slice(anchor, START + stack);
                    }
                    float* to = scratch_anchors + (long)(x.chunk - first) * SLICES * NUMBERS;
                    if (ANCHORED)
#pragma unroll
                        for (int j = 0; j < 8; ++j) put_columns(to, j, rounded(OPEN ? anchor[j] : w[j]));
                }
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    put_columns(scratch + (long)f * SLICES * NUMBERS, j, rounded(w[j]));
            }
            if (f == count - 1) break;
            begin(f, f + 1 < count - 1 ? f + 1 : -1, f == 0, false);
            if (has_slice) {
                const Inputs at = inputs_of(turn);
                const float* token = tokens_of(turn);
                const float whole = token[WHOLE * TILE];
                Square u = square_turned(at.u + warp * TILE * PITCH);
                u = rounded(times(u, of_columns(token + END * TILE)));
                EACH_OF_SLICE w[j].f[r] *= whole;
                add_columns(w, u, at.k);
                if (OPEN && x.number == TILES - 1 && CLOSES[m * chunks + x.chunk])
                    EACH_OF_SLICE anchor[j].f[r] = w[j].f[r];
            }
            turn ^= 1;
        }

        for (int f = count - 1; f >= 0; --f) {
            begin(f, f - 1, f == count - 1, true);
            const Tile x = tile_of(first, f);
            const Inputs at = inputs_of(turn);
            const float* token = tokens_of(turn);
            const float *weights = weights_of(turn), *anchors = anchors_of(turn, x);
            const float *own = weights + warp * NUMBERS, *own_anchor = anchors + warp * NUMBERS;
            const float* rows = at.u + warp * TILE * PITCH;
            float* const key_part = parts.keys + warp * NUMBERS;
            float* const sums = parts.sums + warp * SUMS * TILE;
            const float whole = token[WHOLE * TILE];
            if (ANCHORED && x.number == TILES - 1 && (!OPEN || CLOSES[m * chunks + x.chunk]))
                EACH_OF_SLICE g[j].f[r] += h[j].f[r], h[j].f[r] = 0.f;

            // Of the slice's columns, "turned" where they are rows: gradients of u, before and after the
            // triangle; what keys make of memory and anchor; targets; what queries make.
            Square g_u = {}, g_u_turned = {}, on_w = {}, on_anchor = {}, target = {}, target_turned = {};
            Square on_query = {};
            Queries made = {};
            Between between = {};
            if (has_slice) {
                Square z = {}, products = {};
                float product_of_both = 0.f;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const Quad after = rounded(g[j]), k = columns_of(at.k, j), w = columns_of(own, j);
#pragma unroll
                    for (int r = 0; r < 4; ++r) product_of_both += g[j].f[r] * w.f[r];
                    // To be read along columns.
                    put_columns(key_part, j, after);
                    add_product(z, after, k);
                    if (DGD || !ANCHORED) add_product(on_w, k, w);
                    const Quad a = ANCHORED ? columns_of(own_anchor, j) : w;
                    if (ANCHORED && L2) add_product(on_anchor, k, a);
                    if (TARGETS != VALUE) {
                        const Quad v = columns_of(at.v, j);
                        add_product(target, v, a);
                        if (TARGETS == BOUNDED) add_product(target_turned, a, v);
                    }
                    if (MAKES_READS) {
                        const Quad q = columns_of(at.xq, j);
                        add_product(on_query, q, w);
                        add_product(products, k, q);
                    }
                }
                if (!ANCHORED) on_anchor = on_w;
                if (TARGETS == VALUE) target = part_of(at.v, warp & 3);
                if (HAS_A && has_gates) leave_logits(parts.logits, at.xg, own_anchor);
                if (HAS_Q && makes_queries)
                    made = make_queries(at.xq, own_anchor, warp - FIRST_Q, G_Q_OUT, parts.query_norms, x);
                if (MAKES_READS) {
                    const Square g_y = times(part_turned(at.g_y, warp), of_columns(token + THERE * TILE));
                    g_u_turned = product(g_y, rounded(seen_by_reads(products, token, at.query_squares, eps)));
                }
                put(sums + TO_END * TILE, column_sums(times(square_turned(rows), z)));
                product_of_both = over_lanes(product_of_both, 1, 32);
                if (lane() == 0) sums[TO_WHOLE * TILE] = product_of_both;
                g_u_turned = plus(g_u_turned, times(z, of_columns(token + END * TILE)));
                const Square solve = DGD ? rounded(square_turned(at.solve)) : identity();
                const Square g_u_rounded = rounded(g_u_turned);
                g_u = product(solve, g_u_rounded);
                if (DGD) g_u_turned = product(g_u_rounded, solve);
                if (TARGETS == BOUNDED && !has_gates) {
                    float* to = parts.norms + warp * 2 * TILE;
                    put(to, row_sums(times(target, target)));
                    put(to + TILE, row_sums(times(times(g_u, target), of_rows(token + STEP * TILE))));
                }
            } else {
                between = between_tokens(token, at, eps);
            }
            if (MEETS_FOR_NORMS) __syncthreads();

            float4 g_keys[ROUNDS] = {}, g_values[ROUNDS] = {};
            if (has_slice) {
                const OfRows before = of_rows(token + BEFORE * TILE);
                const Square g_e = negative(times(g_u, of_rows(token + STEP * TILE)));
                const Square g_e_turned = negative(times(g_u_turned, of_columns(token + STEP * TILE)));
                Square e = {}, g_target = negative(g_e), g_target_turned = negative(g_e_turned), g_y = {};
                if (L2) e = on_anchor;
                if (TARGETS == BOUNDED)
                    bound_targets(e, g_target, g_target_turned, target, target_turned, has_gates,
                                  parts.norms + (warp & ~3) * 2 * TILE);
                else
                    e = plus(e, negative(target));
                if (HAS_M) g_y = times(part_of(at.g_y, warp), of_rows(token + THERE * TILE));

                // What the last warp waits for.
                OfRows to_before = {};
                if (DGD) {
                    e = plus(e, times(on_w, before));
                    add(to_before, row_sums(times(g_e, on_w)));
                }
                if (MAKES_READS) {
                    Square read = times(g_y, on_query);
                    if (UNIT) read = times(read, inverse_lengths(of_rows(at.query_squares), eps));
                    add(to_before, row_sums(read));
                }
                put(sums + TO_BEFORE * TILE, to_before);
                put(sums + TO_STEP * TILE, row_sums(negative(times(g_u, e))));
                const Square u = rounded(square_of(rows));
                if (DGD) store_square(parts.triangles, warp, product(rounded(g_u), u));
                if (MAKES_READS) store_square(parts.reads, warp, product(g_y, u));
                come(1, THREADS);
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const Row row = row_of_turn(round, x);
                    if (HAS_K && row.inside) g_keys[round] = four(G_K_OUT + row.place);
                    if (HAS_V && row.inside) g_values[round] = four(G_V_OUT + row.place);
                }

                // The memory and its anchor.
                const OfColumns before_turned = of_columns(token + BEFORE * TILE);
                Square along = {}, along_turned = {};
                if (DGD) along = times(g_e, before), along_turned = times(g_e_turned, before_turned);
                if (!ANCHORED && L2) along = plus(along, g_e), along_turned = plus(along_turned, g_e_turned);
                EACH_OF_SLICE g[j].f[r] *= whole;
                if (DGD || !ANCHORED) add_columns(g, rounded(along_turned), at.k);
                if (ANCHORED && L2) add_columns(of_anchor, rounded(g_e_turned), at.k);
                if (TARGETS != VALUE) add_columns(of_anchor, rounded(g_target_turned), at.v);
                if (HAS_M) {
                    Square g_y = times(part_turned(at.g_y, warp), of_columns(token + THERE * TILE));
                    if (RUNNING) g_y = times(g_y, before_turned);
                    if (UNIT) g_y = times(g_y, inverse_lengths(of_columns(at.query_squares), eps));
                    add_columns(RUNNING ? g : of_anchor, rounded(g_y), at.xq);
                }

                // Parts of the gradients of keys, values and queries.
                __syncwarp();
                const Square by_end = rounded(times(square_of(rows), of_rows(token + END * TILE)));
                const Square g_e_rounded = rounded(g_e);
                along = rounded(along), g_target = rounded(g_target);
#pragma unroll
                for (int half = 0; half < 8; half += 4) {
                    Quad sum[4] = {};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        add_columns(sum[j], by_end, key_part, half + j);
                        if (DGD || !ANCHORED) add_columns(sum[j], along, own, half + j);
                        if (ANCHORED && L2) add_columns(sum[j], g_e_rounded, own_anchor, half + j);
                    }
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < 4; ++j) put_columns(key_part, half + j, sum[j]);
                }
                if (TARGETS == VALUE)
                    put_part(parts.values + (warp >> 2) * NUMBERS, warp & 3, g_target);
                else
                    leave_product(parts.values + warp * NUMBERS, g_target, own_anchor);
                if (HAS_M) {
                    if (RUNNING) g_y = times(g_y, before);
                    leave_product(parts.queries + warp * NUMBERS, rounded(g_y), RUNNING ? own : own_anchor);
                }
                if (HAS_Q && makes_queries)
                    leave_queries(parts.queries, made, warp - FIRST_Q, parts.query_norms, eps);
            } else {
                const Gate gate = load_gate(gates, x);
                await(1, THREADS);
                const Found found =
                    through_gate(add_up(token, parts, between), gate, gates, token, parts, at.key_squares, x);
                g_bias_e += found.step, g_bias_a += found.decay;
            }
            __syncthreads();

            // Rows of keys, values and queries, put together; those that memories made in the first blocks.
            if (has_slice) {
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const Row row = row_of_turn(round, x);
                    if (row.number >= TILE) break;
                    const float4 g_k = key_gradient(g_keys[round], row, parts, at, eps);
                    if (HAS_K)
                        round_four(parts.keys + row.cell, through_unit(g_k, four(at.k + row.cell),
                                                                       token[LENGTH * TILE + row.number]));
                    else if (row.inside)
                        store_four(G_XK + row.place, g_k);
                    const float4 g_v = sum_of_blocks(g_values[round], parts.values, VALUE_PARTS, row.cell);
                    if (HAS_V)
                        round_four(parts.values + row.cell, g_v);
                    else if (row.inside)
                        store_four(G_XV + row.place, g_v);
                    if (HAS_M) {
                        const float4 g_q = query_gradient(row, parts, at, eps);
                        if (row.inside) store_four(G_XQ + row.place, g_q);
                    }
                }
            }

            // And through those memories.
            if (HAS_K || HAS_V || HAS_Q || HAS_G) __syncthreads();
            if (HAS_K && warp < FIRST_V) through_memory(of_anchor, parts.keys, warp, anchors, at.xk, G_XK, x);
            if (HAS_V && warp >= FIRST_V && warp < FIRST_Q)
                through_memory(of_anchor, parts.values, warp - FIRST_V, anchors + FIRST_V * NUMBERS, at.xv,
                               G_XV, x);
            if (HAS_Q && makes_queries)
                through_memory(of_anchor, parts.queries, warp - FIRST_Q, anchors + FIRST_Q * NUMBERS, at.xq,
                               G_XQ, x);
            if (has_gates) through_gates(of_anchor, parts.g_logits, own_anchor, at.xg, G_XG, x);
            if (HAS_RESETS && has_slice && x.number == 0 && RESETS[m * chunks + x.chunk]) {
                EACH_OF_SLICE {
                    G_START[stack + place_of(j, r)] += g[j].f[r] + h[j].f[r];
                    g[j].f[r] = h[j].f[r] = 0.f;
                }
            }
            turn ^= 1;
        }
    }
    if (has_slice) {
        if (OPEN)
            store_slice(G_ANCHOR + stack, h);
        else
            EACH_OF_SLICE g[j].f[r] += h[j].f[r];
        store_slice(G_WEIGHTS + stack, g);
    } else {
        g_bias_e = over_lanes(g_bias_e, 1, TILE), g_bias_a = over_lanes(g_bias_a, 1, TILE);
        if (HAS_E && lane() == 0) G_BIAS_E[m] = g_bias_e;
        if (HAS_A && lane() == 0) G_BIAS_A[m] = g_bias_a;
    }
}
