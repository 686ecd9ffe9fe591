// The walk of ../backward.py for memories of 64 x 64, products in TF32.
//
// A program has one sequence and head, and each of its warps 16 columns of the memories: those of the
// gradient, and of that of the anchor, stay in its registers from the first tile to the last. Of k W, k gW
// and the like a warp makes its columns alone; what is a sum over columns it adds up over all that it does in
// a tile, and leaves as a part in shared memory. The last warp makes of the parts what tokens have alone,
// their steps and decays, while the others go on to the memories. Then the rows of keys and values are put
// together, and go through the memories that made them.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(const QueryInput* XQ, const KeyInput* XK, const ValueInput* XV, const GateInput* XG,
                    const float* ETA, const float* ALPHA, const unsigned char* VALID,
                    const unsigned char* RESETS, const unsigned char* CLOSES, const float* START,
                    const float* BIAS_A, const float* K_OUT, const float* V_OUT, const float* ETA_OUT,
                    const float* KEPT, const float* KEPT_ANCHOR, const float* ROWS, const float* SOLVES,
                    const float* STEPS, const float* DECAYS, const float* LENGTHS, const float* G_Q_OUT,
                    const float* G_K_OUT, const float* G_V_OUT, const float* G_ETA_OUT,
                    const float* G_ALPHA_OUT, const float* G_Y, const float* G_AFTER,
                    const float* G_ANCHOR_AFTER, float* SCRATCH, float* SCRATCH_ANCHORS, QueryInput* G_XQ,
                    KeyInput* G_XK, ValueInput* G_XV, GateInput* G_XG, float* G_ETA, float* G_ALPHA,
                    float* G_START, float* G_WEIGHTS, float* G_ANCHOR, float* G_BIAS_E, float* G_BIAS_A,
                    int tokens, int heads, int chunks, float max_step, float horizon, float eps) {
    extern __shared__ __align__(1024) char shared[];
    // As a value that the compiler knows to be the warp's.
    const int warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
    const bool has_slice = warp < SLICES, has_gates = HAS_G && warp == GATES;
    const long m = blockIdx.x, sequence = m / heads * tokens * heads + m % heads;
    const long stack = m * WIDTH * COLUMNS + 16 * warp;
    const int segments = (chunks + SEGMENT - 1) / SEGMENT;
    float* scratch = SCRATCH + (m * SEGMENT * TILES * SLICES + warp) * NUMBERS;
    float* scratch_anchors = SCRATCH_ANCHORS + (m * SEGMENT * SLICES + warp) * NUMBERS;

    float* const key_parts = (float*)(shared + AT_KEY_PARTS);
    float* const value_parts = (float*)(shared + AT_VALUE_PARTS);
    float* const query_parts = (float*)(shared + AT_QUERY_PARTS);
    float* const triangles = (float*)(shared + AT_TRIANGLES);
    float* const reads = (float*)(shared + AT_READS);
    float* const between = (float*)(shared + AT_BETWEEN);
    float* const scores_of_reads = (float*)(shared + AT_SCORES);
    float* const sums = (float*)(shared + AT_SUMS);
    float* const norms = (float*)(shared + AT_NORMS);
    float* const query_norms = (float*)(shared + AT_QUERY_NORMS);
    float* const g_gates = (float*)(shared + AT_GATES);
    float* const logits = g_gates + 2 * TILE;
    float* const g_squares = logits + TILE;
    float* const own_sums = g_squares + TILE;

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
    // What each token has, by the last warp.
    auto describe = [&](int f, int turn) {
        const Tile x = tile_of(first, f);
        const int token = lane() & 15;
        const bool inside = token < x.rows;
        const long at = x.first + (long)token * heads;
        float* to = tokens_of(turn) + token;
        float decay = inside ? DECAYS[at] : 0.f, through = decay;
        float step = inside ? STEPS[at] : 0.f, length = HAS_K && inside ? LENGTHS[at] : 0.f;
        bool there = inside;
        if (HAS_VALID) there = inside && VALID[at];
#pragma unroll
        for (int d = 1; d < TILE; d *= 2) {
            float before = __shfl_sync(ALL, through, (lane() - d) & 31);
            if (token >= d) through += before;
        }
        float total = __shfl_sync(ALL, through, 15);
        if (lane() >= TILE) return;
        to[STEP * TILE] = step, to[LENGTH * TILE] = length, to[THERE * TILE] = there ? 1.f : 0.f;
        to[THROUGH * TILE] = through, to[EARLIER * TILE] = through - decay;
        to[BEFORE * TILE] = expf(through - decay), to[END * TILE] = expf(total - through);
        to[WHOLE * TILE] = expf(total);
    };
    // Tile f is there, and if there is room the next one under way. alone: none was under way.
    auto begin = [&](int f, int next, bool alone, bool all) {
        if (STAGES == 1 || alone) {
            __syncthreads();
            bring(f, turn, all);
        }
        if (alone && !has_slice) describe(f, turn);
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
        if (!has_slice) describe(next, turn ^ 1);
    };

    // Gradients of the memory after a tile, and of its anchor.
    Quad g[8] = {}, h[8] = {};
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
                if (OPEN)
                    if (x.number == TILES - 1 && CLOSES[m * chunks + x.chunk])
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
            float* const part = key_parts + warp * NUMBERS;
            const float whole = token[WHOLE * TILE];
            if (ANCHORED)
                if (x.number == TILES - 1 && (!OPEN || CLOSES[m * chunks + x.chunk]))
                    EACH_OF_SLICE g[j].f[r] += h[j].f[r], h[j].f[r] = 0.f;

            // Of the thread's columns, a name "turned" where they are rows: gradients of u, before and after
            // the triangle; what key and value make of memory and anchor; the reads and their gradients.
            Square g_u = {}, g_u_turned = {}, on_w = {}, on_anchor = {}, target = {}, target_turned = {};
            Square g_y = {}, g_y_turned = {}, on_query = {}, raw = {}, g_raw = {};
            // The last warp's.
            Square overlap = {}, decays = {}, scores = {};
            if (has_slice) {
                Square z = {}, by_reads = {};
                float product_of_both = 0.f;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const Quad after = rounded(g[j]), k = columns_of(at.k, j), w = columns_of(own, j);
#pragma unroll
                    for (int r = 0; r < 4; ++r) product_of_both += g[j].f[r] * w.f[r];
                    // To be read along columns.
                    put_columns(part, j, after);
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
                        add_product(by_reads, k, q);
                    }
                }
                if (!ANCHORED) on_anchor = on_w;
                if (has_gates) {
                    Square made = {};
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        add_product(made, columns_of(at.xg, j), columns_of(own_anchor, j));
                    if ((lane() & 3) == 0 && HAS_A)
                        logits[own_row()] = made.q[0].f[GATE_A], logits[own_row() + 8] = made.q[0].f[2 + GATE_A];
                }
                if (HAS_Q && warp >= FIRST_Q && warp < GATES) {
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        add_product(raw, columns_of(at.xq, j), columns_of(own_anchor, j));
                    EACH {
                        int row = own_row() + 8 * (r >> 1), column = 8 * s + own_column() + (r & 1);
                        long from = (x.first + (long)row * heads) * WIDTH + 16 * (warp - FIRST_Q) + column;
                        g_raw.q[s].f[r] = row < x.rows ? G_Q_OUT[from] : 0.f;
                    }
                    float* to = query_norms + (warp - FIRST_Q) * 2 * TILE;
                    put(to, row_sums(times(raw, raw)));
                    put(to + TILE, row_sums(times(g_raw, raw)));
                }
                if (HAS_M) {
                    g_y = times(part_of(at.g_y, warp), of_rows(token + THERE * TILE));
                    g_y_turned = times(part_turned(at.g_y, warp), of_columns(token + THERE * TILE));
                }
                if (MAKES_READS) {
                    // Rows are the tokens that are written, columns those that read.
                    const OfRows through = of_rows(token + THROUGH * TILE);
                    const OfColumns earlier = of_columns(token + EARLIER * TILE);
                    OfColumns inverse = {1.f, 1.f, 1.f, 1.f};
                    if (UNIT) inverse = inverse_lengths(of_columns(at.query_squares), eps);
                    EACH {
                        int written = own_row() + 8 * (r >> 1), reads = 8 * s + own_column() + (r & 1);
                        float decay = written < reads ? expf(earlier.of[s][r & 1] - through.of[r >> 1]) : 0.f;
                        by_reads.q[s].f[r] = rounded(by_reads.q[s].f[r] * inverse.of[s][r & 1] * decay);
                    }
                    g_u_turned = product(g_y_turned, by_reads);
                }

                const float* rows = at.u + warp * TILE * PITCH;
                float* to = sums + warp * SUMS * TILE;
                put(to + TO_END * TILE, column_sums(times(square_turned(rows), z)));
                product_of_both = over_lanes(product_of_both, 1, 32);
                if (lane() == 0) to[TO_WHOLE * TILE] = product_of_both;
                g_u_turned = plus(g_u_turned, times(z, of_columns(token + END * TILE)));
                Square solve;
                if (DGD)
                    solve = rounded(square_turned(at.solve));
                else
                    EACH solve.q[s].f[r] =
                        own_row() + 8 * (r >> 1) == 8 * s + own_column() + (r & 1) ? 1.f : 0.f;
                const Square g_u_rounded = rounded(g_u_turned);
                g_u = product(solve, g_u_rounded);
                if (DGD) g_u_turned = product(g_u_rounded, solve);

                if (TARGETS == VALUE) target = part_of(at.v, warp & 3);
                if (TARGETS == BOUNDED && !has_gates) {
                    float* to = norms + warp * 2 * TILE;
                    put(to, row_sums(times(target, target)));
                    put(to + TILE, row_sums(times(times(g_u, target), of_rows(token + STEP * TILE))));
                }
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const Quad k = columns_of(at.k, j);
                    if (DGD) add_product(overlap, k, k);
                    if (MAKES_READS) add_product(scores, columns_of(at.xq, j), k);
                }
                const OfRows earlier = of_rows(token + EARLIER * TILE);
                const OfColumns through = of_columns(token + THROUGH * TILE);
                EACH {
                    int row = own_row() + 8 * (r >> 1), column = 8 * s + own_column() + (r & 1);
                    decays.q[s].f[r] = row > column ? expf(earlier.of[r >> 1] - through.of[s][r & 1]) : 0.f;
                }
                if (MAKES_READS && UNIT)
                    scores = times(scores, inverse_lengths(of_rows(at.query_squares), eps));
            }
            if (MEETS_FOR_NORMS) __syncthreads();

            float4 g_keys[ROUNDS] = {}, g_values[ROUNDS] = {};
            if (has_slice) {
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    int row = (threadIdx.x >> 4) + round * 2 * SLICES;
                    long from = (x.first + (long)row * heads) * WIDTH + (threadIdx.x & 15) * 4;
                    if (HAS_K && row < x.rows) g_keys[round] = four(G_K_OUT + from);
                    if (HAS_V && row < x.rows) g_values[round] = four(G_V_OUT + from);
                }
                const OfRows before = of_rows(token + BEFORE * TILE), end = of_rows(token + END * TILE);
                const OfColumns before_turned = of_columns(token + BEFORE * TILE);
                const Square g_e = negative(times(g_u, of_rows(token + STEP * TILE)));
                const Square g_e_turned = negative(times(g_u_turned, of_columns(token + STEP * TILE)));
                Square e = {}, g_target = negative(g_e), g_target_turned = negative(g_e_turned);
                if (L2) e = on_anchor;
                if (TARGETS != BOUNDED) {
                    e = plus(e, negative(target));
                } else if (has_gates) {
                    EACH {
                        float x = target.q[s].f[r], y = target_turned.q[s].f[r];
                        e.q[s].f[r] -= x * bound(x * x);
                        if (x * x > 1.f) g_target.q[s].f[r] = 0.f;
                        if (y * y > 1.f) g_target_turned.q[s].f[r] = 0.f;
                    }
                } else {
                    OfRows square = {}, along = {};
                    OfColumns square_turned = {}, along_turned = {};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float* from = norms + ((warp & ~3) + i) * 2 * TILE;
                        add(square, of_rows(from)), add(along, of_rows(from + TILE));
                        add(square_turned, of_columns(from)), add(along_turned, of_columns(from + TILE));
                    }
                    EACH {
                        float a = square.of[r >> 1], b = square_turned.of[s][r & 1];
                        e.q[s].f[r] -= target.q[s].f[r] * bound(a);
                        g_target.q[s].f[r] =
                            through_bound(g_target.q[s].f[r], target.q[s].f[r], a, along.of[r >> 1]);
                        g_target_turned.q[s].f[r] =
                            through_bound(g_target_turned.q[s].f[r], target_turned.q[s].f[r], b,
                                          along_turned.of[s][r & 1]);
                    }
                }

                // What the last warp waits for.
                float* to = sums + warp * SUMS * TILE;
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
                put(to + TO_BEFORE * TILE, to_before);
                put(to + TO_STEP * TILE, row_sums(negative(times(g_u, e))));
                const Square u = square_of(at.u + warp * TILE * PITCH), u_rounded = rounded(u);
                if (DGD) store_square(triangles, warp, product(rounded(g_u), u_rounded));
                if (MAKES_READS) store_square(reads, warp, product(g_y, u_rounded));
                come(1, THREADS);

                // Parts of the gradients of keys, values and queries.
                Square along = {}, along_turned = {};
                if (DGD) along = times(g_e, before), along_turned = times(g_e_turned, before_turned);
                if (!ANCHORED && L2) along = plus(along, g_e), along_turned = plus(along_turned, g_e_turned);
                Quad sum[8] = {};
                __syncwarp();
                add_columns(sum, rounded(times(u, end)), part);
                if (DGD || !ANCHORED) add_columns(sum, rounded(along), own);
                if (ANCHORED && L2) add_columns(sum, rounded(g_e), own_anchor);
                __syncwarp();
                put_block(part, sum);
                g_target = rounded(g_target);
                if (TARGETS == VALUE) {
                    float* values = value_parts + (warp >> 2) * NUMBERS;
                    put_columns(values, 2 * (warp & 3), g_target.q[0]);
                    put_columns(values, 2 * (warp & 3) + 1, g_target.q[1]);
                } else {
                    Quad sum[8] = {};
                    add_columns(sum, g_target, own_anchor);
                    put_block(value_parts + warp * NUMBERS, sum);
                }
                if (HAS_M) {
                    Quad sum[8] = {};
                    if (RUNNING) g_y = times(g_y, before), g_y_turned = times(g_y_turned, before_turned);
                    add_columns(sum, rounded(g_y), RUNNING ? own : own_anchor);
                    put_block(query_parts + warp * NUMBERS, sum);
                }

                // The memory and its anchor.
                EACH_OF_SLICE g[j].f[r] *= whole;
                if (DGD || !ANCHORED) add_columns(g, rounded(along_turned), at.k);
                if (ANCHORED && L2) add_columns(of_anchor(g, h), rounded(g_e_turned), at.k);
                if (TARGETS != VALUE) add_columns(of_anchor(g, h), rounded(g_target_turned), at.v);
                if (HAS_M) {
                    if (UNIT)
                        g_y_turned = times(g_y_turned, inverse_lengths(of_columns(at.query_squares), eps));
                    if (RUNNING)
                        add_columns(g, rounded(g_y_turned), at.xq);
                    else
                        add_columns(of_anchor(g, h), rounded(g_y_turned), at.xq);
                }
                if (HAS_Q && warp >= FIRST_Q && warp < GATES) {
                    OfRows square = {}, along = {};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        add(square, of_rows(query_norms + i * 2 * TILE));
                        add(along, of_rows(query_norms + i * 2 * TILE + TILE));
                    }
                    const OfRows inverse = inverse_lengths(square, eps);
                    EACH {
                        float by = inverse.of[r >> 1];
                        g_raw.q[s].f[r] =
                            rounded(by * (g_raw.q[s].f[r] - raw.q[s].f[r] * along.of[r >> 1] * by * by));
                    }
                    put_columns(query_parts, 2 * (warp - FIRST_Q), g_raw.q[0]);
                    put_columns(query_parts, 2 * (warp - FIRST_Q) + 1, g_raw.q[1]);
                }
            } else {
                // Rows are tokens; what each has alone lies with the lane of its number.
                const int own_token = lane() & 15;
                const bool inside = own_token < x.rows, there = token[THERE * TILE + own_token] != 0.f;
                const long place = x.first + (long)own_token * heads;
                float eta = 0.f, alpha = 1.f, g_eta_out = 0.f, g_alpha_out = 0.f;
                if (inside) {
                    eta = HAS_E ? ETA_OUT[place] : ETA[place];
                    if (!HAS_A) alpha = fmaxf(ALPHA[place], 2e-38f);
                    if (HAS_E) g_eta_out = G_ETA_OUT[place];
                    if (HAS_A) g_alpha_out = G_ALPHA_OUT[place];
                }
                await(1, THREADS);
                Found found = add_up(token, sums, triangles, reads, overlap, decays, scores, between,
                                     scores_of_reads, own_sums);
                if (!there) found = {0.f, 0.f};
                float logit = 0.f;
                if (HAS_A && inside) {
                    logit = logits[own_token] + BIAS_A[m];
                    alpha = expf(-softplus(logit) / horizon);
                }
                if (CAP) {
                    // The step is the smaller one of eta and a limit.
                    const float square = at.key_squares[own_token], limit = alpha / fmaxf(square, TINY);
                    const float by_limit = eta <= limit ? 0.f : found.step * limit;
                    if (eta > limit) found.step = 0.f;
                    found.decay += by_limit;
                    if (lane() < TILE)
                        g_squares[own_token] = square > TINY ? -by_limit / square : 0.f;
                }
                if (HAS_E) {
                    found.step = inside ? (found.step + g_eta_out) * eta * (1.f - eta / max_step) : 0.f;
                    g_bias_e += found.step;
                } else if (inside && lane() < TILE) {
                    G_ETA[place] = found.step;
                }
                if (HAS_A) {
                    found.decay += g_alpha_out * alpha;
                    found.decay = inside ? found.decay * sigmoid(logit) / -horizon : 0.f;
                    g_bias_a += found.decay;
                } else if (inside && lane() < TILE) {
                    G_ALPHA[place] = found.decay / alpha;
                }
                if (HAS_G && lane() < TILE) {
                    g_gates[own_token] = rounded(GATE_E == 0 ? found.step : found.decay);
                    g_gates[TILE + own_token] =
                        HAS_E && HAS_A ? rounded(GATE_E == 1 ? found.step : found.decay) : 0.f;
                }
            }
            __syncthreads();

            // Keys, values and queries: a row to 16 threads.
            if (has_slice) {
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const int row = (threadIdx.x >> 4) + round * 2 * SLICES, c = (threadIdx.x & 15) * 4;
                    if (row >= TILE) break;
                    const long to = (x.first + (long)row * heads) * WIDTH + c;
                    const float4 k = four(at.k + cell(row, c));
                    float4 g_k = g_keys[round], g_v = g_values[round];
                    for (int i = 0; i < SLICES; ++i) add(g_k, 1.f, four(key_parts + i * NUMBERS + cell(row, c)));
                    for (int i = 0; i < VALUE_PARTS; ++i)
                        add(g_v, 1.f, four(value_parts + i * NUMBERS + cell(row, c)));
                    if (DGD)
#pragma unroll
                        for (int j = 0; j < TILE; ++j)
                            add(g_k, between[row * PITCH + j], four(at.k + cell(j, c)));
                    if (MAKES_READS)
#pragma unroll
                        for (int j = 0; j < TILE; ++j) {
                            float by = scores_of_reads[j * PITCH + row];
                            if (UNIT) by *= rsqrtf(at.query_squares[j] + eps);
                            add(g_k, by, four(at.xq + cell(j, c)));
                        }
                    if (CAP) add(g_k, 2.f * g_squares[row], k);
                    if (HAS_K) {
                        const float along = over_lanes(dot(g_k, k), 1, 16), length = token[LENGTH * TILE + row];
                        float4 by = {};
                        add(by, length, g_k), add(by, -length * along, k);
                        round_four(key_parts + cell(row, c), by);
                    } else if (row < x.rows) {
                        store_four(G_XK + to, g_k);
                    }
                    if (HAS_V)
                        round_four(value_parts + cell(row, c), g_v);
                    else if (row < x.rows)
                        store_four(G_XV + to, g_v);
                    if (HAS_M) {
                        float4 g_q = {};
                        for (int i = 0; i < 4; ++i)
                            add(g_q, 1.f, four(query_parts + i * NUMBERS + cell(row, c)));
                        if (MAKES_READS)
#pragma unroll
                            for (int j = 0; j < TILE; ++j)
                                add(g_q, scores_of_reads[row * PITCH + j], four(at.k + cell(j, c)));
                        if (UNIT) {
                            const float4 q = four(at.xq + cell(row, c));
                            const float inverse = rsqrtf(at.query_squares[row] + eps);
                            const float along = over_lanes(dot(g_q, q), 1, 16);
                            float4 by = {};
                            add(by, inverse, g_q), add(by, -inverse * inverse * inverse * along, q);
                            g_q = by;
                        }
                        if (row < x.rows) store_four(G_XQ + to, g_q);
                    }
                }
            }

            // And through the memories that made them.
            if (HAS_K || HAS_V || HAS_Q || HAS_G) __syncthreads();
            if (HAS_K && warp < FIRST_V)
                through_memory(of_anchor(g, h), key_parts, warp, anchors, at.xk, G_XK, x);
            if (HAS_V && warp >= FIRST_V && warp < FIRST_Q)
                through_memory(of_anchor(g, h), value_parts, warp - FIRST_V, anchors + FIRST_V * NUMBERS,
                               at.xv, G_XV, x);
            if (HAS_Q && warp >= FIRST_Q && warp < GATES)
                through_memory(of_anchor(g, h), query_parts, warp - FIRST_Q, anchors + FIRST_Q * NUMBERS,
                               at.xq, G_XQ, x);
            if (has_gates) through_gates(of_anchor(g, h), g_gates, own_anchor, at.xg, G_XG, x);
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
