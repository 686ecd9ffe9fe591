// Blocks of 16 rows of 64 numbers, and products of them on the matrix units, a warp at a time.
//
// A block holds a number for each of 16 tokens, or of 16 columns of a memory, and each of the 64 numbers that
// go into a memory. Of a product's 16 x 8 sums thread 4 g + t of a warp has (g, 2 t), (g, 2 t + 1), (g + 8,
// 2 t), (g + 8, 2 t + 1): a Quad. The matrix units want operands as (g, t), (g + 8, t), (g, t + 4), (g + 8,
// t + 4), but in which order they add up is free: where t and t + 4 stand for 2 t and 2 t + 1, a Quad is an
// operand as it is.

static const int TILE = 16, WIDTH = 64, NUMBERS = TILE * WIDTH, BLOCK_BYTES = NUMBERS * 4;
static const u32 ALL = 0xffffffffu;
// From row to row of a square of 16 x 16 in shared memory.
static const int PITCH = 20;

struct Quad {
    float f[4];
};
// 16 x 16, the second Quad with the columns 8 ..
struct Square {
    Quad q[2];
};

#define EACH _Pragma("unroll") for (int s = 0; s < 2; ++s) _Pragma("unroll") for (int r = 0; r < 4; ++r)

__device__ __forceinline__ int lane() {
    return threadIdx.x & 31;
}
__device__ __forceinline__ int own_row() {
    return lane() >> 2;
}
__device__ __forceinline__ int own_column() {
    return 2 * (lane() & 3);
}
// Of number r of a Square's Quad s.
__device__ __forceinline__ int row_of(int r) {
    return own_row() + 8 * (r >> 1);
}
__device__ __forceinline__ int column_of(int s, int r) {
    return 8 * s + own_column() + (r & 1);
}

// --- shared memory ---

// By how many pieces of 8 the columns of a row of a block are turned: so that neither rows nor columns have
// conflicts. Bit by bit, so that the places of a thread's numbers are a few, and what is known beforehand.
__device__ __forceinline__ int turn_of(int row) {
    return (row ^ (row >> 2 & 1)) & 3;
}
__device__ __forceinline__ int cell(int row, int column) {
    return row * WIDTH + (column ^ turn_of(row) << 3);
}
// cell(own_row(), 8 j + own_column()), and the same of row + 8 at 8 WIDTH more.
__device__ __forceinline__ int cell_of_row(int j) {
    return own_row() * WIDTH + own_column() + 8 * (j & 3 ^ turn_of(own_row())) + 8 * (j & 4);
}
// cell(own_column() + c, 8 j + own_row()) for c of 0 and 1, and the same of row + 8 at 8 WIDTH more.
__device__ __forceinline__ int cell_of_column(int j, int c) {
    return own_column() * WIDTH + own_row() + 8 * (j & 3 ^ c ^ turn_of(own_column())) + 8 * (j & 4) +
           c * WIDTH;
}
__device__ __forceinline__ float number(const float* x) {
    return *x;
}
__device__ __forceinline__ float number(const bf16* x) {
    return __uint_as_float((u32)*x << 16);
}
__device__ __forceinline__ float2 pair(const float* x) {
    return *(const float2*)x;
}
__device__ __forceinline__ float2 pair(const bf16* x) {
    u32 w = *(const u32*)x;
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}
__device__ __forceinline__ float4 four(const float* x) {
    return *(const float4*)x;
}
__device__ __forceinline__ float4 four(const bf16* x) {
    float2 a = pair(x), b = pair(x + 2);
    return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
    *(float2*)to = make_float2(a, b);
}
__device__ __forceinline__ void store_pair(bf16* to, float a, float b) {
    *(u32*)to = pack(a, b);
}
__device__ __forceinline__ void store_four(float* to, const float4& x) {
    *(float4*)to = x;
}
__device__ __forceinline__ void store_four(bf16* to, const float4& x) {
    *(uint2*)to = make_uint2(pack(x.x, x.y), pack(x.z, x.w));
}
__device__ __forceinline__ float dot(const float4& x, const float4& y) {
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
// sum += by x.
__device__ __forceinline__ void add(float4& sum, float by, const float4& x) {
    sum.x += by * x.x, sum.y += by * x.y, sum.z += by * x.z, sum.w += by * x.w;
}
// Columns 8 j .. + 8 of a block.
template <typename T>
__device__ __forceinline__ Quad columns_of(const T* block, int j) {
    const T* at = block + cell_of_row(j);
    float2 a = pair(at), b = pair(at + 8 * WIDTH);
    return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ void put_columns(float* block, int j, const Quad& x) {
    float* at = block + cell_of_row(j);
    store_pair(at, x.f[0], x.f[1]);
    store_pair(at + 8 * WIDTH, x.f[2], x.f[3]);
}
// The columns 16 i .. + 16 of a block, and the same turned: its rows are those columns.
template <typename T>
__device__ __forceinline__ Square part_of(const T* block, int i) {
    return {columns_of(block, 2 * i), columns_of(block, 2 * i + 1)};
}
__device__ __forceinline__ void put_part(float* block, int i, const Square& x) {
    put_columns(block, 2 * i, x.q[0]);
    put_columns(block, 2 * i + 1, x.q[1]);
}
__device__ __forceinline__ Square part_turned(const float* block, int i) {
    Square x;
    EACH x.q[s].f[r] = block[cell_of_column(2 * i + (r >> 1), r & 1) + 8 * s * WIDTH];
    return x;
}
// The same of a square.
__device__ __forceinline__ Square square_of(const float* x) {
    Square y;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        float2 a = pair(x + own_row() * PITCH + 8 * s + own_column());
        float2 b = pair(x + (own_row() + 8) * PITCH + 8 * s + own_column());
        y.q[s] = {a.x, a.y, b.x, b.y};
    }
    return y;
}
__device__ __forceinline__ Square square_turned(const float* x) {
    Square y;
    EACH y.q[s].f[r] = x[(8 * s + own_column() + (r & 1)) * PITCH + own_row() + 8 * (r >> 1)];
    return y;
}
// Squares by number, in the order of threads.
__device__ __forceinline__ void store_square(float* to, int i, const Square& x) {
    float4* at = (float4*)to + i * 64 + lane();
    at[0] = make_float4(x.q[0].f[0], x.q[0].f[1], x.q[0].f[2], x.q[0].f[3]);
    at[32] = make_float4(x.q[1].f[0], x.q[1].f[1], x.q[1].f[2], x.q[1].f[3]);
}
__device__ __forceinline__ Square load_square(const float* from, int i) {
    const float4* at = (const float4*)from + i * 64 + lane();
    const float4 a = at[0], b = at[32];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// --- what each token, or row, has ---

// Of the thread's rows, and of its columns in a Square.
struct OfRows {
    float of[2];
};
struct OfColumns {
    float of[2][2];
};
__device__ __forceinline__ OfRows of_rows(const float* x) {
    return {x[own_row()], x[own_row() + 8]};
}
__device__ __forceinline__ OfColumns of_columns(const float* x) {
    float2 a = pair(x + own_column()), b = pair(x + 8 + own_column());
    return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ Square times(const Square& x, const OfRows& by) {
    Square y;
    EACH y.q[s].f[r] = x.q[s].f[r] * by.of[r >> 1];
    return y;
}
__device__ __forceinline__ Square times(const Square& x, const OfColumns& by) {
    Square y;
    EACH y.q[s].f[r] = x.q[s].f[r] * by.of[s][r & 1];
    return y;
}
__device__ __forceinline__ Square times(const Square& x, const Square& y) {
    Square z;
    EACH z.q[s].f[r] = x.q[s].f[r] * y.q[s].f[r];
    return z;
}
__device__ __forceinline__ Square plus(const Square& x, const Square& y) {
    Square z;
    EACH z.q[s].f[r] = x.q[s].f[r] + y.q[s].f[r];
    return z;
}
__device__ __forceinline__ Square negative(const Square& x) {
    Square y;
    EACH y.q[s].f[r] = -x.q[s].f[r];
    return y;
}
__device__ __forceinline__ void add(OfRows& sum, const OfRows& x) {
    sum.of[0] += x.of[0], sum.of[1] += x.of[1];
}
__device__ __forceinline__ void add(OfColumns& sum, const OfColumns& x) {
    sum.of[0][0] += x.of[0][0], sum.of[0][1] += x.of[0][1];
    sum.of[1][0] += x.of[1][0], sum.of[1][1] += x.of[1][1];
}
__device__ __forceinline__ Square rounded(const Square& x) {
    Square y;
    EACH y.q[s].f[r] = rounded(x.q[s].f[r]);
    return y;
}
__device__ __forceinline__ Quad rounded(const Quad& x) {
    return {rounded(x.f[0]), rounded(x.f[1]), rounded(x.f[2]), rounded(x.f[3])};
}
__device__ __forceinline__ float over_lanes(float x, int from, int to) {
#pragma unroll
    for (int d = from; d < to; d *= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}
// Sums of the rows, at the threads of each, and of the columns.
__device__ __forceinline__ OfRows row_sums(const Square& x) {
    OfRows sums = {0.f, 0.f};
    EACH sums.of[r >> 1] += x.q[s].f[r];
    return {over_lanes(sums.of[0], 1, 4), over_lanes(sums.of[1], 1, 4)};
}
__device__ __forceinline__ OfColumns column_sums(const Square& x) {
    OfColumns sums = {0.f, 0.f, 0.f, 0.f};
    EACH sums.of[s][r & 1] += x.q[s].f[r];
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < 2; ++c) sums.of[s][c] = over_lanes(sums.of[s][c], 4, 32);
    return sums;
}
__device__ __forceinline__ void put(float* to, const OfRows& x) {
    if ((lane() & 3) == 0) to[own_row()] = x.of[0], to[own_row() + 8] = x.of[1];
}
__device__ __forceinline__ void put(float* to, const OfColumns& x) {
    if (own_row() == 0) {
        *(float2*)(to + own_column()) = make_float2(x.of[0][0], x.of[0][1]);
        *(float2*)(to + 8 + own_column()) = make_float2(x.of[1][0], x.of[1][1]);
    }
}

__device__ __forceinline__ OfRows inverse_lengths(const OfRows& squares, float eps) {
    return {rsqrtf(squares.of[0] + eps), rsqrtf(squares.of[1] + eps)};
}
__device__ __forceinline__ OfColumns inverse_lengths(const OfColumns& squares, float eps) {
    return {rsqrtf(squares.of[0][0] + eps), rsqrtf(squares.of[0][1] + eps), rsqrtf(squares.of[1][0] + eps),
            rsqrtf(squares.of[1][1] + eps)};
}

// --- products, of operands that are rounded ---

// sum += x y^T, of 8 columns of both.
__device__ __forceinline__ void add_product(Square& sum, const Quad& x, const Quad& y) {
    multiply_add(sum.q[0].f, x.f[0], x.f[2], x.f[1], x.f[3], y.f[0], y.f[1]);
    multiply_add(sum.q[1].f, x.f[0], x.f[2], x.f[1], x.f[3], y.f[2], y.f[3]);
}
__device__ __forceinline__ void add_product(Square& sum, const Square& x, const Square& y) {
    add_product(sum, x.q[0], y.q[0]);
    add_product(sum, x.q[1], y.q[1]);
}
__device__ __forceinline__ Square product(const Square& x, const Square& y) {
    Square sum = {};
    add_product(sum, x, y);
    return sum;
}
// sum += the columns 8 j .. + 8 of x times a block.
template <typename T>
__device__ __forceinline__ void add_columns(Quad& sum, const Square& x, const T* block, int j) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
        multiply_add(sum.f, x.q[s].f[0], x.q[s].f[2], x.q[s].f[1], x.q[s].f[3],
                     number(block + cell_of_column(j, 0) + 8 * s * WIDTH),
                     number(block + cell_of_column(j, 1) + 8 * s * WIDTH));
}
template <typename T>
__device__ __forceinline__ void add_columns(Quad (&sum)[8], const Square& x, const T* block) {
#pragma unroll
    for (int j = 0; j < 8; ++j) add_columns(sum[j], x, block, j);
}
// The product as a block.
__device__ __forceinline__ void leave_product(float* to, const Square& x, const float* block) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        Quad sum = {};
        add_columns(sum, x, block, j);
        put_columns(to, j, sum);
    }
}
