// The warps of a program and its shared memory.
//
// A warp has a slice, 16 columns of the memories that stand beside each other in a stack (of the gates'
// matrix the first 16); the last warp has what tokens have alone. Slices lie as blocks, turned: their rows
// are the columns of the memory.

#if HALF_K
typedef bf16 KeyInput;
#else
typedef float KeyInput;
#endif
#if HALF_V
typedef bf16 ValueInput;
#else
typedef float ValueInput;
#endif
#if HALF_Q
typedef bf16 QueryInput;
#else
typedef float QueryInput;
#endif
#if HALF_G
typedef bf16 GateInput;
#else
typedef float GateInput;
#endif
#if HAS_K
typedef float Key;
#else
typedef KeyInput Key;
#endif
#if HAS_V
typedef float Value;
#else
typedef ValueInput Value;
#endif

// TARGETS.
static const int BOUNDED = 1, VALUE = 2;
static const float TINY = 1e-24f;

// The first slices of memories.
static const bool HAS_E = GATE_E >= 0, HAS_A = GATE_A >= 0, HAS_G = HAS_E || HAS_A;
static const int FIRST_V = 4 * HAS_K, FIRST_Q = FIRST_V + 4 * HAS_V, GATES = FIRST_Q + 4 * (HAS_Q + HAS_M);
static const int SLICES = GATES + HAS_G, THREADS = 32 * (SLICES + 1);
// From row to row of a stack.
static const int COLUMNS = 16 * GATES + 32 * HAS_G;
// Whether the anchor may be other than the memory before a tile.
static const bool ANCHORED = TILES > 1 || OPEN;
static const bool MAKES_READS = HAS_M && RUNNING;
static const bool MEETS_FOR_NORMS = TARGETS == BOUNDED || HAS_Q;
static const int SQUARE_BYTES = TILE * PITCH * 4;

// Bytes of the rows of a tile; of all of its inputs, where there are such.
static const int AT_V = sizeof(Key) * NUMBERS;
static const int AT_XK = AT_V + sizeof(Value) * NUMBERS;
static const int AT_XV = AT_XK + HAS_K * sizeof(KeyInput) * NUMBERS;
static const int AT_XQ = AT_XV + HAS_V * sizeof(ValueInput) * NUMBERS;
static const int AT_XG = AT_XQ + (HAS_Q || HAS_M) * sizeof(QueryInput) * NUMBERS;
static const int AT_G_Y = AT_XG + HAS_G * sizeof(GateInput) * NUMBERS;
static const int AT_ROWS = AT_G_Y + HAS_M * BLOCK_BYTES;
static const int AT_SOLVE = AT_ROWS + SLICES * SQUARE_BYTES;
static const int AT_LENGTHS = AT_SOLVE + DGD * SQUARE_BYTES;
static const int ROWS_BYTES = AT_LENGTHS + 2 * TILE * 4;
// What each token has, by kind: the step, the decays before and after it, the logarithms of those up to it
// with and without its own, whether it is there, the inverse length of its key, the decay of the whole tile.
enum { STEP, BEFORE, END, THROUGH, EARLIER, THERE, LENGTH, WHOLE, KINDS };
// Sums over the columns of a slice.
enum { TO_END, TO_STEP, TO_BEFORE, TO_WHOLE, SUMS };

static const int VALUE_PARTS = TARGETS == VALUE ? GATES / 4 : SLICES;
static const int AT_WEIGHTS = STAGES * ROWS_BYTES;
static const int AT_ANCHORS = AT_WEIGHTS + STAGES * SLICES * BLOCK_BYTES;
static const int AT_KEY_PARTS = AT_ANCHORS + ANCHORED * STAGES * SLICES * BLOCK_BYTES;
static const int AT_VALUE_PARTS = AT_KEY_PARTS + SLICES * BLOCK_BYTES;
static const int AT_QUERY_PARTS = AT_VALUE_PARTS + VALUE_PARTS * BLOCK_BYTES;
static const int AT_TRIANGLES = AT_QUERY_PARTS + (HAS_M ? 4 : HAS_Q) * BLOCK_BYTES;
static const int AT_READS = AT_TRIANGLES + DGD * SLICES * 1024;
static const int AT_BETWEEN = AT_READS + MAKES_READS * 4 * 1024;
static const int AT_SCORES = AT_BETWEEN + DGD * SQUARE_BYTES;
static const int AT_TOKENS = AT_SCORES + MAKES_READS * SQUARE_BYTES;
static const int AT_SUMS = AT_TOKENS + 2 * KINDS * TILE * 4;
static const int AT_NORMS = AT_SUMS + SLICES * SUMS * TILE * 4;
static const int AT_QUERY_NORMS = AT_NORMS + (TARGETS == BOUNDED) * SLICES * 2 * TILE * 4;
static const int AT_GATES = AT_QUERY_NORMS + HAS_Q * 4 * 2 * TILE * 4;
static const int BYTES = AT_GATES + 6 * TILE * 4;
static_assert(BYTES == SHARED, "the room that a program is given");

// Tile `number` of a chunk: its first row in [B, T, H], how many it has, and how many lie from one to the
// next.
struct Tile {
    int chunk, number, rows, apart;
    long first;
};
// Its inputs in shared memory: blocks, each slice's rows u and the solution of the triangle as squares, and
// the squared lengths of keys and queries.
struct Inputs {
    Key* k;
    Value* v;
    KeyInput* xk;
    ValueInput* xv;
    QueryInput* xq;
    GateInput* xg;
    float *g_y, *u, *solve, *key_squares, *query_squares;
};
__device__ __forceinline__ Inputs inputs_at(char* x) {
    return {(Key*)x,
            (Value*)(x + AT_V),
            (KeyInput*)(x + AT_XK),
            (ValueInput*)(x + AT_XV),
            (QueryInput*)(x + AT_XQ),
            (GateInput*)(x + AT_XG),
            (float*)(x + AT_G_Y),
            (float*)(x + AT_ROWS),
            (float*)(x + AT_SOLVE),
            (float*)(x + AT_LENGTHS),
            (float*)(x + AT_LENGTHS) + TILE};
}

// What the warps leave for each other: parts of the gradients of keys, values and queries as blocks; of the
// triangle and of the products of reads as squares, and sums, of each slice; what keys get by the overlap of
// keys, and they and queries by the scores of reads; norms; and of each token the gradients of the gates'
// logits, the logit of alpha, the gradient of the key's squared length, and room for two sums.
struct Parts {
    float *keys, *values, *queries, *triangles, *reads, *between, *scores, *sums, *norms, *query_norms;
    float *g_logits, *logits, *g_squares, *room;
};
__device__ __forceinline__ Parts parts_at(char* x) {
    float* gates = (float*)(x + AT_GATES);
    return {(float*)(x + AT_KEY_PARTS),
            (float*)(x + AT_VALUE_PARTS),
            (float*)(x + AT_QUERY_PARTS),
            (float*)(x + AT_TRIANGLES),
            (float*)(x + AT_READS),
            (float*)(x + AT_BETWEEN),
            (float*)(x + AT_SCORES),
            (float*)(x + AT_SUMS),
            (float*)(x + AT_NORMS),
            (float*)(x + AT_QUERY_NORMS),
            gates,
            gates + 2 * TILE,
            gates + 3 * TILE,
            gates + 4 * TILE};
}

// --- copies ---

// The rows of a tile as a block, by all threads, and what each thread has copied rounded; the squared lengths
// of the rows, unless null, as they were before.
template <typename T>
__device__ __forceinline__ void copy_rows(T* block, const T* from, const Tile& tile) {
    const int piece = 16 / sizeof(T), pieces = WIDTH / piece;
    for (int x = threadIdx.x; x < TILE * pieces; x += THREADS) {
        int row = x / pieces, column = x % pieces * piece;
        bool there = row < tile.rows;
        copy_piece(block + cell(row, column),
                   from + (there ? tile.first + (long)row * tile.apart : 0) * WIDTH + column, there);
    }
}
__device__ __forceinline__ void round_four(float* at, const float4& x) {
    *(float4*)at = make_float4(rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w));
}
// TF32 has all numbers of bfloat16.
__device__ __forceinline__ void round_four(bf16*, const float4&) {}
template <typename T>
__device__ __forceinline__ void round_rows(T* block, float* squares) {
    const int piece = 16 / sizeof(T), pieces = WIDTH / piece;
    for (int x = threadIdx.x; x < TILE * pieces; x += THREADS) {
        T* at = block + cell(x / pieces, x % pieces * piece);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < piece; i += 4) {
            float4 y = four(at + i);
            sum += dot(y, y);
            round_four(at + i, y);
        }
        if (squares) {
            sum = over_lanes(sum, 1, pieces);
            if (x % pieces == 0) squares[x / pieces] = sum;
        }
    }
}
// By a warp: a square of `rows` rows, and a block that lies in global memory as in shared memory.
__device__ __forceinline__ void copy_square(float* to, const float* from, long apart, int rows) {
#pragma unroll
    for (int x = lane(); x < TILE * 4; x += 32) {
        int row = x >> 2, column = (x & 3) * 4;
        copy_piece(to + row * PITCH + column, from + (row < rows ? row * apart : 0) + column, row < rows);
    }
}
__device__ __forceinline__ void copy_block(float* to, const float* from) {
#pragma unroll
    for (int x = lane() * 4; x < NUMBERS; x += 128) copy_piece(to + x, from + x, true);
}

// --- slices in a stack, from the warp's first column on ---

__device__ __forceinline__ long place_of(int j, int r) {
    return (8 * j + own_column() + (r & 1)) * COLUMNS + own_row() + 8 * (r >> 1);
}
#define EACH_OF_SLICE \
    _Pragma("unroll") for (int j = 0; j < 8; ++j) _Pragma("unroll") for (int r = 0; r < 4; ++r)
__device__ __forceinline__ void load_slice(Quad (&x)[8], const float* stack) {
    EACH_OF_SLICE x[j].f[r] = stack[place_of(j, r)];
}
__device__ __forceinline__ void store_slice(float* stack, const Quad (&x)[8]) {
    EACH_OF_SLICE stack[place_of(j, r)] = x[j].f[r];
}
