// Targets, errors and reads of a slice.

// What a target of that squared length is multiplied by, and a gradient by way of it, for the product
// `along` of target and gradient.
__device__ __forceinline__ float bound(float square) {
    return rsqrtf(fmaxf(square, 1.f));
}
__device__ __forceinline__ float through_bound(float g, float target, float square, float along) {
    float scale = bound(square);
    return scale * (square > 1.f ? g - along * scale * scale * target : g);
}
// Takes bounded targets from the errors e, and makes of the gradients of these targets those of the targets
// themselves; turned: with rows for columns. Those of gates are each a row of its own; for rows of others
// there are norms of each slice.
__device__ __forceinline__ void bound_targets(Square& e, Square& g, Square& g_turned, const Square& target,
                                              const Square& turned, bool of_gates, const float* norms) {
    if (of_gates) {
        EACH {
            const float x = target.q[s].f[r], y = turned.q[s].f[r];
            e.q[s].f[r] -= x * bound(x * x);
            if (x * x > 1.f) g.q[s].f[r] = 0.f;
            if (y * y > 1.f) g_turned.q[s].f[r] = 0.f;
        }
        return;
    }
    OfRows square = {}, along = {};
    OfColumns square_turned = {}, along_turned = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* from = norms + i * 2 * TILE;
        add(square, of_rows(from)), add(along, of_rows(from + TILE));
        add(square_turned, of_columns(from)), add(along_turned, of_columns(from + TILE));
    }
    EACH {
        const float x = target.q[s].f[r], y = turned.q[s].f[r];
        e.q[s].f[r] -= x * bound(square.of[r >> 1]);
        g.q[s].f[r] = through_bound(g.q[s].f[r], x, square.of[r >> 1], along.of[r >> 1]);
        g_turned.q[s].f[r] =
            through_bound(g_turned.q[s].f[r], y, square_turned.of[s][r & 1], along_turned.of[s][r & 1]);
    }
}
// What the rows u give to the reads of later tokens, from products of keys, as rows, and queries.
__device__ __forceinline__ Square seen_by_reads(const Square& products, const float* token,
                                                const float* query_squares, float eps) {
    const OfRows through = of_rows(token + THROUGH * TILE);
    const OfColumns earlier = of_columns(token + EARLIER * TILE);
    Square x = {};
    EACH {
        const float decay = expf(earlier.of[s][r & 1] - through.of[r >> 1]);
        if (row_of(r) < column_of(s, r)) x.q[s].f[r] = products.q[s].f[r] * decay;
    }
    return UNIT ? times(x, inverse_lengths(of_columns(query_squares), eps)) : x;
}
__device__ __forceinline__ Square identity() {
    Square x;
    EACH x.q[s].f[r] = row_of(r) == column_of(s, r) ? 1.f : 0.f;
    return x;
}
