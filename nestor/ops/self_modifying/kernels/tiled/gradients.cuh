// Pieces of the gradient of a tile.

// Turns in which threads that have slices go through the rows of a tile, 16 threads to a row.
static const int ROUNDS = (TILE + 2 * SLICES - 1) / (2 * SLICES);

__device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.f) + logf(1.f + expf(-fabsf(x)));
}
__device__ __forceinline__ float sigmoid(float x) {
    return 1.f / (1.f + expf(-x));
}
__device__ __forceinline__ OfRows inverse_lengths(const OfRows& squares, float eps) {
    return {rsqrtf(squares.of[0] + eps), rsqrtf(squares.of[1] + eps)};
}
__device__ __forceinline__ OfColumns inverse_lengths(const OfColumns& squares, float eps) {
    return {rsqrtf(squares.of[0][0] + eps), rsqrtf(squares.of[0][1] + eps), rsqrtf(squares.of[1][0] + eps),
            rsqrtf(squares.of[1][1] + eps)};
}
// What a target of that squared length is multiplied by, and a gradient by way of it, for the product
// `along` of target and gradient.
__device__ __forceinline__ float bound(float square) {
    return rsqrtf(fmaxf(square, 1.f));
}
__device__ __forceinline__ float through_bound(float g, float target, float square, float along) {
    float scale = bound(square);
    return scale * (square > 1.f ? g - along * scale * scale * target : g);
}
// The gradient that products with the anchor add to.
__device__ __forceinline__ Quad (&of_anchor(Quad (&g)[8], Quad (&h)[8]))[8] {
    return ANCHORED ? h : g;
}

// --- what tokens have alone, by the last warp ---

// Gradients of the step and of the logarithm of the decay of the token of the lane's number.
struct Found {
    float step, decay;
};
// From the parts of all slices. Rows and columns of squares are tokens: `overlap` of keys, `scores` of queries
// and keys, `decays` from token to token, 0 where the row's is not the later one. Leaves the gradients of the
// overlap, both ways, and of the scores. own: room for two rows.
__device__ __forceinline__ Found add_up(const float* token, const float* sums, const float* triangles,
                                        const float* reads, const Square& overlap, const Square& decays,
                                        const Square& scores, float* between, float* scores_of_reads,
                                        float* own) {
    const int number = lane() & 15;
    float step = 0.f, before = 0.f, end = 0.f, whole = 0.f, through = 0.f;
    for (int i = 0; i < SLICES; ++i) {
        const float* from = sums + i * SUMS * TILE;
        step += from[TO_STEP * TILE + number], before += from[TO_BEFORE * TILE + number];
        end += from[TO_END * TILE + number], whole += from[TO_WHOLE * TILE];
    }
    before *= token[BEFORE * TILE + number], end *= token[END * TILE + number];
    Square by_decay = {};
    if (DGD) {
        Square g = {};
        for (int i = 0; i < SLICES; ++i) g = plus(g, negative(load_square(triangles, i)));
        g = times(g, decays);
        put(own, row_sums(times(g, overlap)));
        g = times(g, of_rows(token + STEP * TILE));
        by_decay = times(g, overlap);
        EACH {
            int row = own_row() + 8 * (r >> 1), column = 8 * s + own_column() + (r & 1);
            if (row >= column) between[row * PITCH + column] = g.q[s].f[r];
            if (row > column) between[column * PITCH + row] = g.q[s].f[r];
        }
        __syncwarp();
        step += own[number];
        __syncwarp();
    }
    if (MAKES_READS) {
        Square g = {};
        for (int i = 0; i < 4; ++i) g = plus(g, load_square(reads, i));
        g = times(g, decays);
        by_decay = plus(by_decay, times(g, scores));
        EACH scores_of_reads[(own_row() + 8 * (r >> 1)) * PITCH + 8 * s + own_column() + (r & 1)] = g.q[s].f[r];
    }
    put(own, row_sums(by_decay));
    put(own + TILE, column_sums(by_decay));
    __syncwarp();
    before += own[number], through -= own[TILE + number] + end;
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

// --- through the memories that made keys, values, queries and gates ---

// From the gradients of rows that a memory made, a block, to that of the memory, for a slice of it, and to
// those columns of the gradient of x. weights: all slices of the memory.
template <typename T>
__device__ __forceinline__ void through_memory(Quad (&g)[8], const float* made, int slice,
                                               const float* weights, const T* x, T* g_x, const Tile& tile) {
    add_columns(g, part_turned(made, slice), x);
    Square sum = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Square part = part_of(made, i);
        add_columns(sum.q[0], part, weights + i * NUMBERS, 2 * slice);
        add_columns(sum.q[1], part, weights + i * NUMBERS, 2 * slice + 1);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int row = own_row() + 8 * h;
            T* to = g_x + (tile.first + (long)row * tile.apart) * WIDTH + 16 * slice + 8 * s + own_column();
            if (row < tile.rows) store_pair(to, sum.q[s].f[2 * h], sum.q[s].f[2 * h + 1]);
        }
}
// The same of the gates, from the gradients of their logits, two rows.
template <typename T>
__device__ __forceinline__ void through_gates(Quad (&g)[8], const float* logits, const float* weights,
                                              const T* x, T* g_x, const Tile& tile) {
    Square turned = {};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < 2; ++c)
            if (own_row() < 2) turned.q[s].f[c] = logits[own_row() * TILE + 8 * s + own_column() + c];
    add_columns(g, turned, x);
    const int column = 2 * lane();
    const float2 a = pair(weights + cell(0, column)), b = pair(weights + cell(1, column));
    for (int row = 0; row < tile.rows; ++row) {
        float by_a = logits[row], by_b = logits[TILE + row];
        store_pair(g_x + (tile.first + (long)row * tile.apart) * WIDTH + column, by_a * a.x + by_b * b.x,
                   by_a * a.y + by_b * b.y);
    }
}
