// Rows that memories made, or that were given: keys, values, queries and gates, and the way back through the
// memories that made them.

// Turns in which threads that have slices go through the rows of a tile, 16 threads to a row.
static const int ROUNDS = (TILE + 2 * SLICES - 1) / (2 * SLICES);

// What 16 threads have of a row of a turn: its number, the first of four columns, and its place in memory.
struct Row {
    int number, column, cell;
    long place;
    bool inside;
};
__device__ __forceinline__ Row row_of_turn(int round, const Tile& x) {
    const int number = (threadIdx.x >> 4) + round * 2 * SLICES, column = (threadIdx.x & 15) * 4;
    return {number, column, cell(number, column), (x.first + (long)number * x.apart) * WIDTH + column,
            number < x.rows};
}
// x / sqrt(|x|^2 + eps) backward, for y of that length: inverse (g - y (g . y)), for 16 threads.
__device__ __forceinline__ float4 through_unit(const float4& g, const float4& y, float inverse) {
    const float along = over_lanes(dot(g, y), 1, 16);
    float4 x = {};
    add(x, inverse, g), add(x, -inverse * along, y);
    return x;
}
__device__ __forceinline__ float4 sum_of_blocks(float4 sum, const float* blocks, int count, int cell) {
    for (int i = 0; i < count; ++i) add(sum, 1.f, four(blocks + i * NUMBERS + cell));
    return sum;
}
// Gradients of a row's key, from that of what its memory made on: by the parts, by other keys and by reads.
__device__ __forceinline__ float4 key_gradient(float4 g, const Row& row, const Parts& parts, const Inputs& at,
                                               float eps) {
    g = sum_of_blocks(g, parts.keys, SLICES, row.cell);
    if (DGD)
#pragma unroll 4
        for (int j = 0; j < TILE; ++j)
            add(g, parts.between[row.number * PITCH + j], four(at.k + cell(j, row.column)));
    if (MAKES_READS)
#pragma unroll 4
        for (int j = 0; j < TILE; ++j) {
            float by = parts.scores[j * PITCH + row.number];
            if (UNIT) by *= rsqrtf(at.query_squares[j] + eps);
            add(g, by, four(at.xq + cell(j, row.column)));
        }
    if (CAP) add(g, 2.f * parts.g_squares[row.number], four(at.k + row.cell));
    return g;
}
// And of the query that "mem" is read with.
__device__ __forceinline__ float4 query_gradient(const Row& row, const Parts& parts, const Inputs& at,
                                                 float eps) {
    float4 g = sum_of_blocks(float4{}, parts.queries, 4, row.cell);
    if (MAKES_READS)
#pragma unroll 4
        for (int j = 0; j < TILE; ++j)
            add(g, parts.scores[row.number * PITCH + j], four(at.k + cell(j, row.column)));
    if (!UNIT) return g;
    const float inverse = rsqrtf(at.query_squares[row.number] + eps);
    float4 unit = {};
    add(unit, inverse, four(at.xq + row.cell));
    return through_unit(g, unit, inverse);
}

// --- queries that a memory makes ---

// A slice of them before they are of unit length, and of the gradients of those that are; leaves sums of
// rows.
struct Queries {
    Square raw, g;
};
__device__ __forceinline__ Queries make_queries(const QueryInput* xq, const float* weights, int slice,
                                                const float* G_Q_OUT, float* norms, const Tile& x) {
    Queries q = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) add_product(q.raw, columns_of(xq, j), columns_of(weights, j));
    EACH {
        const long from = (x.first + (long)row_of(r) * x.apart) * WIDTH + 16 * slice + column_of(s, r);
        if (row_of(r) < x.rows) q.g.q[s].f[r] = G_Q_OUT[from];
    }
    put(norms + slice * 2 * TILE, row_sums(times(q.raw, q.raw)));
    put(norms + slice * 2 * TILE + TILE, row_sums(times(q.g, q.raw)));
    return q;
}
// The sums of all slices there, leaves the gradients of what the memory made.
__device__ __forceinline__ void leave_queries(float* block, const Queries& q, int slice, const float* norms,
                                              float eps) {
    OfRows square = {}, along = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        add(square, of_rows(norms + i * 2 * TILE));
        add(along, of_rows(norms + i * 2 * TILE + TILE));
    }
    const OfRows inverse = inverse_lengths(square, eps);
    Square g;
    EACH {
        const float by = inverse.of[r >> 1];
        g.q[s].f[r] = rounded(by * (q.g.q[s].f[r] - q.raw.q[s].f[r] * along.of[r >> 1] * by * by));
    }
    put_part(block, slice, g);
}

// --- through the memories that made them ---

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
            const int row = own_row() + 8 * h;
            T* to = g_x + (tile.first + (long)row * tile.apart) * WIDTH + 16 * slice + 8 * s + own_column();
            if (row < tile.rows) store_pair(to, sum.q[s].f[2 * h], sum.q[s].f[2 * h + 1]);
        }
}
// The logits of alpha, without their bias.
__device__ __forceinline__ void leave_logits(float* logits, const GateInput* x, const float* weights) {
    Square made = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) add_product(made, columns_of(x, j), columns_of(weights, j));
    if ((lane() & 3) == 0)
        logits[own_row()] = made.q[0].f[GATE_A & 1], logits[own_row() + 8] = made.q[0].f[2 + (GATE_A & 1)];
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
