// What tokens have alone, their steps and decays, and what lies between two of them: by the last warp, for
// whose lanes a token is the lane's number, and each a row and a column of squares.

__device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.f) + logf(1.f + expf(-fabsf(x)));
}
__device__ __forceinline__ float sigmoid(float x) {
    return 1.f / (1.f + expf(-x));
}

// Before a tile is worked on.
__device__ __forceinline__ void describe(float* to, const Tile& x, const float* STEPS, const float* DECAYS,
                                         const float* LENGTHS, const unsigned char* VALID) {
    const int token = lane() & 15;
    const bool inside = token < x.rows;
    const long at = x.first + (long)token * x.apart;
    to += token;
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
}

// Products of keys, and of queries and keys; decays from token to token, 0 where the row's is not the later.
struct Between {
    Square overlap, scores, decays;
};
__device__ __forceinline__ Between between_tokens(const float* token, const Inputs& at, float eps) {
    Between x = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const Quad k = columns_of(at.k, j);
        if (DGD) add_product(x.overlap, k, k);
        if (MAKES_READS) add_product(x.scores, columns_of(at.xq, j), k);
    }
    if (MAKES_READS && UNIT) x.scores = times(x.scores, inverse_lengths(of_rows(at.query_squares), eps));
    const OfRows earlier = of_rows(token + EARLIER * TILE);
    const OfColumns through = of_columns(token + THROUGH * TILE);
    EACH {
        const bool later = row_of(r) > column_of(s, r);
        if (later) x.decays.q[s].f[r] = expf(earlier.of[r >> 1] - through.of[s][r & 1]);
    }
    return x;
}

// Gradients of the step and of the logarithm of the decay of the token of the lane's number.
struct Found {
    float step, decay;
};
// From the parts of all slices; leaves what keys and queries get by their products with each other.
__device__ __forceinline__ Found add_up(const float* token, const Parts& parts, const Between& x) {
    const int number = lane() & 15;
    float step = 0.f, before = 0.f, end = 0.f, whole = 0.f, through = 0.f;
    for (int i = 0; i < SLICES; ++i) {
        const float* from = parts.sums + i * SUMS * TILE;
        step += from[TO_STEP * TILE + number], before += from[TO_BEFORE * TILE + number];
        end += from[TO_END * TILE + number], whole += from[TO_WHOLE * TILE];
    }
    before *= token[BEFORE * TILE + number], end *= token[END * TILE + number];
    Square by_decay = {};
    if (DGD) {
        Square g = {};
        for (int i = 0; i < SLICES; ++i) g = plus(g, negative(load_square(parts.triangles, i)));
        g = times(g, x.decays);
        put(parts.room, row_sums(times(g, x.overlap)));
        g = times(g, of_rows(token + STEP * TILE));
        by_decay = times(g, x.overlap);
        EACH {
            int row = row_of(r), column = column_of(s, r);
            if (row >= column) parts.between[row * PITCH + column] = g.q[s].f[r];
            if (row > column) parts.between[column * PITCH + row] = g.q[s].f[r];
        }
        __syncwarp();
        step += parts.room[number];
        __syncwarp();
    }
    if (MAKES_READS) {
        Square g = {};
        for (int i = 0; i < 4; ++i) g = plus(g, load_square(parts.reads, i));
        g = times(g, x.decays);
        by_decay = plus(by_decay, times(g, x.scores));
        EACH parts.scores[row_of(r) * PITCH + column_of(s, r)] = g.q[s].f[r];
    }
    put(parts.room, row_sums(by_decay));
    put(parts.room + TILE, column_sums(by_decay));
    __syncwarp();
    before += parts.room[number], through -= parts.room[TILE + number] + end;
    // The sums over this token and later ones of `through`, over later ones of `before`.
    const float next = __shfl_sync(ALL, before, lane() + 1 & 31);
    float sum = through + (number < TILE - 1 ? next : 0.f);
#pragma unroll
    for (int d = 1; d < TILE; d *= 2) {
        const float later = __shfl_sync(ALL, sum, lane() + d & 31);
        if (number + d < TILE) sum += later;
    }
    return {step, sum + over_lanes(end, 1, TILE) + whole * token[WHOLE * TILE]};
}

// Where steps and decays come from: eta and alpha, or a bias of the logit of alpha; the gradients of what
// memories made of them; room for those of eta and alpha that none made.
struct Gates {
    const float *eta, *alpha, *bias_a, *g_eta_out, *g_alpha_out;
    float *g_eta, *g_alpha;
    float max_step, horizon;
};
// Of the lane's token.
struct Gate {
    float eta, alpha, g_eta_out, g_alpha_out;
};
__device__ __forceinline__ Gate load_gate(const Gates& from, const Tile& x) {
    const int number = lane() & 15;
    const long at = x.first + (long)number * x.apart;
    Gate gate = {0.f, 1.f, 0.f, 0.f};
    if (number >= x.rows) return gate;
    gate.eta = from.eta[at];
    if (!HAS_A) gate.alpha = fmaxf(from.alpha[at], 2e-38f);
    if (HAS_E) gate.g_eta_out = from.g_eta_out[at];
    if (HAS_A) gate.g_alpha_out = from.g_alpha_out[at];
    return gate;
}
// Through the cap and the gates: gradients of the logits of memories, which it returns and leaves for them,
// or of eta and alpha.
__device__ __forceinline__ Found through_gate(Found found, Gate gate, const Gates& gates, const float* token,
                                              const Parts& parts, const float* key_squares, const Tile& x) {
    const int number = lane() & 15;
    const bool inside = number < x.rows, writes = inside && lane() < TILE;
    const long at = x.first + (long)number * x.apart;
    if (token[THERE * TILE + number] == 0.f) found = {0.f, 0.f};
    float logit = 0.f;
    if (HAS_A && inside) {
        logit = parts.logits[number] + *gates.bias_a;
        gate.alpha = expf(-softplus(logit) / gates.horizon);
    }
    if (CAP) {
        // The step is the smaller one of eta and a limit.
        const float square = key_squares[number], limit = gate.alpha / fmaxf(square, TINY);
        const float by_limit = gate.eta <= limit ? 0.f : found.step * limit;
        if (gate.eta > limit) found.step = 0.f;
        found.decay += by_limit;
        if (lane() < TILE) parts.g_squares[number] = square > TINY ? -by_limit / square : 0.f;
    }
    if (HAS_E) {
        const float slope = gate.eta * (1.f - gate.eta / gates.max_step);
        found.step = inside ? (found.step + gate.g_eta_out) * slope : 0.f;
    } else if (writes) {
        gates.g_eta[at] = found.step;
    }
    if (HAS_A) {
        found.decay += gate.g_alpha_out * gate.alpha;
        found.decay = inside ? found.decay * sigmoid(logit) / -gates.horizon : 0.f;
    } else if (writes) {
        gates.g_alpha[at] = found.decay / gate.alpha;
    }
    if (HAS_G && lane() < TILE) {
        parts.g_logits[number] = rounded(GATE_E == 0 ? found.step : found.decay);
        const float second = GATE_E == 1 ? found.step : found.decay;
        parts.g_logits[TILE + number] = HAS_E && HAS_A ? rounded(second) : 0.f;
    }
    return found;
}
