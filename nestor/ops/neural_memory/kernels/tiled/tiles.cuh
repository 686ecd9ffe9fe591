// Tiles of 64 x 64 numbers, and the products of two of them, for programs of 8 warps.
//
// A tile of operands lies in shared memory as bfloat16, its 16-byte pieces swizzled as the matrix units want
// them, and in global memory in the same order ("as a tile"): copies of 8 KiB in one piece. A tile of sums is
// a fragment: warp w has the rows 16 (w % 4) .. + 16 and the columns 32 (w / 4) .. + 32, and of these thread
// 4 g + t of the warp has f[j][0..3] = (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1) with c = 8 j + 2 t.
// Work on elements needs no exchange then: all tiles of a program are cut alike. What only such work reads
// again lies in global memory "as a fragment".

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

static const int TILE = 64;
static const int NUMBERS = TILE * TILE;
static const int TILE_BYTES = NUMBERS * 2;
static const int THREADS = 256;
// Slices of 64 of the hidden width.
static const int HIDDEN = SPLIT * TILE;
static const int SIZE = TILE * HIDDEN;
static const int PARTS = MOMENTUM ? 4 : 2;

struct Fragment {
    float f[4][4];
};
// A fragment rounded to bfloat16: word [j][h] holds columns c, c + 1 of row g + 8 h.
struct Packed {
    u32 w[4][2];
};

#define FOR_EACH _Pragma("unroll") for (int j = 0; j < 4; ++j) _Pragma("unroll") for (int r = 0; r < 4; ++r)

__device__ __forceinline__ int lane_id() {
    return threadIdx.x & 31;
}
__device__ __forceinline__ int warp_row() {
    return (threadIdx.x >> 5 & 3) * 16;
}
__device__ __forceinline__ int warp_column() {
    return (threadIdx.x >> 7) * 32;
}
// Which half of the columns the warp has, as a value that the compiler knows to be the warp's.
__device__ __forceinline__ int side_of_warp() {
    return __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
}
// The thread's first row, and its first column in the columns of group j.
__device__ __forceinline__ int own_row() {
    return warp_row() + (lane_id() >> 2);
}
__device__ __forceinline__ int own_column(int j) {
    return warp_column() + 8 * j + 2 * (lane_id() & 3);
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
// The address of `p`, a place in shared memory, in the program `rank` of the cluster.
__device__ __forceinline__ u32 remote(const void* p, int rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
    return r;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
    return w;
}
__device__ __forceinline__ float low_half(u32 w) {
    return __uint_as_float(w << 16);
}
__device__ __forceinline__ float high_half(u32 w) {
    return __uint_as_float(w & 0xffff0000u);
}

__device__ __forceinline__ Packed packed(const Fragment& x) {
    Packed y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        y.w[j][0] = pack(x.f[j][0], x.f[j][1]);
        y.w[j][1] = pack(x.f[j][2], x.f[j][3]);
    }
    return y;
}
__device__ __forceinline__ float at(const Packed& x, int j, int r) {
    u32 w = x.w[j][r >> 1];
    return r & 1 ? high_half(w) : low_half(w);
}
__device__ __forceinline__ void clear(Fragment& x) {
    FOR_EACH x.f[j][r] = 0.f;
}
__device__ __forceinline__ void multiply(Fragment& x, float by) {
    FOR_EACH x.f[j][r] *= by;
}
__device__ __forceinline__ void scale_rows(Fragment& x, const float (&by)[2]) {
    FOR_EACH x.f[j][r] *= by[r >> 1];
}
__device__ __forceinline__ void add(Fragment& x, const Fragment& y) {
    FOR_EACH x.f[j][r] += y.f[j][r];
}
__device__ __forceinline__ void add(Fragment& x, const Packed& y) {
    FOR_EACH x.f[j][r] += at(y, j, r);
}
// x = a x + b y.
__device__ __forceinline__ void combine(Fragment& x, float a, float b, const Fragment& y) {
    FOR_EACH x.f[j][r] = a * x.f[j][r] + b * y.f[j][r];
}
__device__ __forceinline__ Fragment times(const Fragment& x, const Fragment& y) {
    Fragment z;
    FOR_EACH z.f[j][r] = x.f[j][r] * y.f[j][r];
    return z;
}
__device__ __forceinline__ Fragment times(const Fragment& x, const Packed& y) {
    Fragment z;
    FOR_EACH z.f[j][r] = x.f[j][r] * at(y, j, r);
    return z;
}
__device__ __forceinline__ Fragment rows_scaled(const Packed& x, const float (&by)[2]) {
    Fragment z;
    FOR_EACH z.f[j][r] = at(x, j, r) * by[r >> 1];
    return z;
}
// The sum over the thread's own columns of row g + 8 h.
__device__ __forceinline__ float row_part(const Fragment& x, int h) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += x.f[j][2 * h] + x.f[j][2 * h + 1];
    return sum;
}
// The same over the columns of the thread's warp.
__device__ __forceinline__ float warp_sum_of_four(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// --- shared memory ---

// Byte of element (row, column) of a tile; columns of one piece of 8 lie together.
__device__ __forceinline__ u32 tile_byte(int row, int column) {
    return row * 128 + (((column >> 3) ^ (row & 7)) << 4) + (column & 7) * 2;
}
__device__ __forceinline__ void store_tile(char* tile, const Packed& x) {
    u32 base = shared_address(tile);
    int i = lane_id() >> 3, row = warp_row() + (i & 1) * 8 + (lane_id() & 7);
#pragma unroll
    for (int j = 0; j < 4; j += 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         base + tile_byte(row, warp_column() + 8 * (j + (i >> 1)))),
                     "r"(x.w[j][0]), "r"(x.w[j][1]), "r"(x.w[j + 1][0]), "r"(x.w[j + 1][1])
                     : "memory");
}
__device__ __forceinline__ Packed load_tile(const char* tile) {
    Packed x;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            x.w[j][h] = *(const u32*)(tile + tile_byte(own_row() + 8 * h, own_column(j)));
    return x;
}
// Writes to tiles by the threads, seen by the matrix and copy units after the barrier.
__device__ __forceinline__ void tiles_ready() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}
// Four columns of a row.
__device__ __forceinline__ float4 four(uint2 w) {
    return make_float4(low_half(w.x), high_half(w.x), low_half(w.y), high_half(w.y));
}
__device__ __forceinline__ float4 load_four(const char* tile, int row, int column) {
    return four(*(const uint2*)(tile + tile_byte(row, column)));
}
__device__ __forceinline__ uint2 pack_four(float4 x, float by = 1.f) {
    return make_uint2(pack(x.x * by, x.y * by), pack(x.z * by, x.w * by));
}
__device__ __forceinline__ void store_four(char* tile, int row, int column, float4 x, float by = 1.f) {
    *(uint2*)(tile + tile_byte(row, column)) = pack_four(x, by);
}

// --- products ---

#if WGMMA
// The place of a tile, for the matrix units: 128-byte rows swizzled in groups of 8 rows, 1024 bytes apart.
__device__ __forceinline__ u64 describe(const char* tile) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
// Products work on these registers: not to be moved meanwhile.
__device__ __forceinline__ void settle(Fragment& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        asm volatile("" : "+f"(x.f[j][0]), "+f"(x.f[j][1]), "+f"(x.f[j][2]), "+f"(x.f[j][3])::"memory");
}
template <int TA, int TB>
__device__ __forceinline__ void matrix_step(Fragment& d, u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
        "%11, "
        "%12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;\n}"
        : "+f"(d.f[0][0]), "+f"(d.f[0][1]), "+f"(d.f[0][2]), "+f"(d.f[0][3]), "+f"(d.f[1][0]),
          "+f"(d.f[1][1]), "+f"(d.f[1][2]), "+f"(d.f[1][3]), "+f"(d.f[2][0]), "+f"(d.f[2][1]),
          "+f"(d.f[2][2]), "+f"(d.f[2][3]), "+f"(d.f[3][0]), "+f"(d.f[3][1]), "+f"(d.f[3][2]), "+f"(d.f[3][3])
        : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}
// Begin sum = A B or, with ADD, sum += A B, where A is tile a or, with TA, its transpose; B likewise.
template <bool TA, bool TB, bool ADD>
__device__ __forceinline__ void begin_product(Fragment& sum, const char* a, const char* b, int side) {
    u64 x = describe(a), y = describe(b) + (TB ? 32 * 128 : 32 * 2) / 16 * side;
    settle(sum);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k)
        matrix_step<TA, !TB>(sum, x + k * (TA ? 128 : 2), y + k * (TB ? 2 : 128), ADD || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    settle(sum);
}
// All products that were begun are there; each fragment is to be settled before it is used.
__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#else
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <bool TA, bool TB, bool ADD>
__device__ __forceinline__ void begin_product(Fragment& sum, const char* a, const char* b, int side) {
    int lane = lane_id(), i = lane >> 3, r = lane & 7;
    u32 a0 = shared_address(a), b0 = shared_address(b);
    int m = warp_row(), n = 32 * side;
    if (!ADD) clear(sum);
#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
        u32 x[4], y[2][4];
        if (TA)
            load_matrices<true>(x, a0 + tile_byte(k + (i >> 1) * 8 + r, m + (i & 1) * 8));
        else
            load_matrices<false>(x, a0 + tile_byte(m + (i & 1) * 8 + r, k + (i >> 1) * 8));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int column = n + 16 * h;
            if (TB)
                load_matrices<false>(y[h], b0 + tile_byte(column + (i >> 1) * 8 + r, k + (i & 1) * 8));
            else
                load_matrices<true>(y[h], b0 + tile_byte(k + (i & 1) * 8 + r, column + (i >> 1) * 8));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            multiply_add(sum.f[j], x, y[j >> 1][2 * (j & 1)], y[j >> 1][2 * (j & 1) + 1]);
    }
}
__device__ __forceinline__ void end_products() {}
__device__ __forceinline__ void settle(Fragment&) {}
#endif

// --- global memory ---

// bfloat16 as a fragment.
__device__ __forceinline__ void store_fragment(bf16* base, const Packed& x) {
    uint4* place = (uint4*)base + threadIdx.x;
    place[0] = make_uint4(x.w[0][0], x.w[0][1], x.w[1][0], x.w[1][1]);
    place[THREADS] = make_uint4(x.w[2][0], x.w[2][1], x.w[3][0], x.w[3][1]);
}
__device__ __forceinline__ Packed load_fragment(const bf16* base) {
    const uint4* place = (const uint4*)base + threadIdx.x;
    uint4 a = place[0], b = place[THREADS];
    Packed x;
    x.w[0][0] = a.x, x.w[0][1] = a.y, x.w[1][0] = a.z, x.w[1][1] = a.w;
    x.w[2][0] = b.x, x.w[2][1] = b.y, x.w[3][0] = b.z, x.w[3][1] = b.w;
    return x;
}
// float32 in rows `stride` numbers apart.
__device__ __forceinline__ void store_floats(float* base, int stride, const Fragment& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            *(float2*)(base + (own_row() + 8 * h) * stride + own_column(j)) =
                make_float2(x.f[j][2 * h], x.f[j][2 * h + 1]);
}
__device__ __forceinline__ Fragment load_floats(const float* base, int stride) {
    Fragment x;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float2 v = *(const float2*)(base + (own_row() + 8 * h) * stride + own_column(j));
            x.f[j][2 * h] = v.x, x.f[j][2 * h + 1] = v.y;
        }
    return x;
}
// bfloat16 in rows `stride` numbers apart, the first `rows` of them.
__device__ __forceinline__ void store_rows(bf16* base, long stride, int rows, const Packed& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
        if (own_row() + 8 * h < rows)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                *(u32*)(base + (own_row() + 8 * h) * stride + own_column(j)) = x.w[j][h];
}
__device__ __forceinline__ Packed load_rows(const bf16* base, long stride, int rows) {
    Packed x;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            x.w[j][h] = own_row() + 8 * h < rows
                            ? *(const u32*)(base + (own_row() + 8 * h) * stride + own_column(j))
                            : 0;
    return x;
}
// bfloat16 in rows `stride` numbers apart, a tile's two pieces of 16 bytes to a thread; rows from `rows` on
// are 0.
struct Pieces {
    uint4 piece[2];
};
__device__ __forceinline__ Pieces load_pieces(const bf16* base, long stride, int rows) {
    Pieces x;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int place = threadIdx.x + h * THREADS, row = place >> 3;
        x.piece[h] = make_uint4(0, 0, 0, 0);
        if (row < rows) x.piece[h] = *(const uint4*)(base + row * stride + (place & 7) * 8);
    }
    return x;
}
__device__ __forceinline__ void store_pieces(char* tile, const Pieces& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int place = threadIdx.x + h * THREADS;
        *(uint4*)(tile + tile_byte(place >> 3, (place & 7) * 8)) = x.piece[h];
    }
}

// --- copies in the background, of whole tiles; by thread 0 ---

// What a program waits for: bytes that come into its shared memory, from copies or from other programs.
struct Arrival {
    u64* barrier;
    u32 bytes, parity;
};
__device__ __forceinline__ void prepare(const Arrival& x) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(x.barrier)) : "memory");
}
__device__ __forceinline__ void prepared() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(const Arrival& x) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(x.barrier)),
                 "r"(x.bytes)
                 : "memory");
}
__device__ __forceinline__ void await(Arrival& x) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra WAIT;\n}" ::"r"(shared_address(x.barrier)),
        "r"(x.parity)
        : "memory");
    x.parity ^= 1;
}
// A tile on its way into shared memory; `arrival` counts its bytes.
__device__ __forceinline__ void fetch(char* tile, const bf16* from, const Arrival& arrival) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(tile)),
        "l"(from), "r"(TILE_BYTES), "r"(shared_address(arrival.barrier))
        : "memory");
}
// Keeps the compiler from holding a register for every address that follows from i.
__device__ __forceinline__ void opaque(int& i) {
    asm volatile("" : "+r"(i));
}
// A tile on its way to global memory; it is not to be written before `sent`.
__device__ __forceinline__ void send(bf16* to, const char* tile) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
        "r"(shared_address(tile)), "r"(TILE_BYTES)
        : "memory");
}
__device__ __forceinline__ void sent() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// From memory to the cache.
__device__ __forceinline__ void bring(const void* from, int bytes = TILE_BYTES) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// --- elements ---

// phi(z), phi'(z), phi''(z). The normal distribution by Abramowitz and Stegun's 7.1.26, exact to 1e-7, whose
// exponential is that of the density.
__device__ __forceinline__ void activate(float z, float& value, float& slope, float& curvature) {
    if (ACTIVATION == 0) {
        float e = __expf(-0.5f * z * z), t = __fdividef(1.f, 1.f + 0.23164189f * fabsf(z));
        float tail = 0.5f * e * t *
                     (0.254829592f +
                      t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        float cdf = z >= 0.f ? 1.f - tail : tail, density = 0.3989422804f * e;
        value = z * cdf;
        slope = cdf + z * density;
        curvature = density * (2.f - z * z);
    } else {
        float s = __fdividef(1.f, 1.f + __expf(-z)), rest = 1.f - s;
        value = z * s;
        slope = s + value * rest;
        curvature = rest * (2.f * slope - value);
    }
}

// The sum of x over the columns of each of the thread's two rows; `sums`: 128 numbers of shared memory.
__device__ __forceinline__ void sum_rows(float (&x)[2], float* sums) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        x[h] = warp_sum_of_four(x[h]);
        if ((lane_id() & 3) == 0) sums[(threadIdx.x >> 7) * TILE + own_row() + 8 * h] = x[h];
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) x[h] = sums[own_row() + 8 * h] + sums[TILE + own_row() + 8 * h];
    __syncthreads();
}

// Rows with sixteen threads to each, four columns to a thread.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int d = 1; d < 16; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float row_sum(float4 x) {
    return row_sum(x.x + x.y + x.z + x.w);
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator-(float4 a, float4 b) {
    return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 operator*(float4 a, float b) {
    return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 operator-(float4 a, float b) {
    return make_float4(a.x - b, a.y - b, a.z - b, a.w - b);
}
__device__ __forceinline__ float4 all_of(float x) {
    return make_float4(x, x, x, x);
}

// The standardised row, and 1/s; without a layer norm the row and 1.
__device__ __forceinline__ float4 standardise(float4 z, float eps, float& inverse) {
    inverse = 1.f;
    if (NORM != 2) return z;
    z = z - row_sum(z) * (1.f / TILE);
    inverse = rsqrtf(row_sum(z * z) * (1.f / TILE) + eps);
    return z * inverse;
}
// The derivative of `standardise`, which is symmetric: P w / s.
__device__ __forceinline__ float4 through_norm(float4 w, float4 zh, float inverse) {
    if (NORM != 2) return w;
    float mean = row_sum(w) * (1.f / TILE), along = row_sum(w * zh) * (1.f / TILE);
    return (w - mean - zh * along) * inverse;
}
// f(x) from the standardised output of the MLP.
__device__ __forceinline__ float4 head(float4 x, float4 zh, float4 gamma, float4 beta) {
    if (NORM == 2) return x + gamma * zh + beta;
    if (NORM == 1) return x + zh;
    return zh;
}
#ifdef LOSS
// d loss / d f.
__device__ __forceinline__ float4 loss_error(float4 f, float4 v, float scale, float threshold) {
    if (LOSS == 1) return v * -scale;
    float4 e = f - v;
    if (LOSS == 2)
        e = make_float4(fminf(fmaxf(e.x, -threshold), threshold), fminf(fmaxf(e.y, -threshold), threshold),
                        fminf(fmaxf(e.z, -threshold), threshold), fminf(fmaxf(e.w, -threshold), threshold));
    return e * scale;
}
// The gradient of f from that of the error; f and v only with Huber's loss.
__device__ __forceinline__ float4 output_gradient(float4 g, float4 f, float4 v, float scale,
                                                  float threshold) {
    if (LOSS == 1) return all_of(0.f);
    if (LOSS == 2) {
        float4 miss = f - v;
        return make_float4(
            fabsf(miss.x) < threshold ? g.x * scale : 0.f, fabsf(miss.y) < threshold ? g.y * scale : 0.f,
            fabsf(miss.z) < threshold ? g.z * scale : 0.f, fabsf(miss.w) < threshold ? g.w * scale : 0.f);
    }
    return g * scale;
}
#endif
