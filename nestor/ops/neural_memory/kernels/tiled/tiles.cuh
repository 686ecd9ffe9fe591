// Tiles of 64 x 64 numbers, and the products of two of them, for programs of 8 warps.
//
// A tile of operands lies in shared memory as bfloat16, its 16-byte pieces swizzled so that neither the matrix
// loads nor the stores of a fragment meet in a bank. A tile of sums is a fragment: warp w has the rows
// 16 (w % 4) .. + 16 and the columns 32 (w / 4) .. + 32, and of these thread 4 g + t of the warp has
// f[j][0..3] = (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1) with c = 8 j + 2 t. Work on elements needs no
// exchange then: all tiles of a program are cut alike.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

static const int TILE = 64;
static const int TILE_BYTES = TILE * TILE * 2;
static const int THREADS = 256;

struct Fragment {
    float f[4][4];
};
// A fragment rounded to bfloat16: word [j][h] holds columns c, c + 1 of row g + 8 h.
struct Packed {
    u32 w[4][2];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_row() { return (threadIdx.x >> 5 & 3) * 16; }
__device__ __forceinline__ int warp_column() { return (threadIdx.x >> 7) * 32; }
// The thread's first row, and its first column in the columns of group j.
__device__ __forceinline__ int own_row() { return warp_row() + (lane_id() >> 2); }
__device__ __forceinline__ int own_column(int j) { return warp_column() + 8 * j + 2 * (lane_id() & 3); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
    return w;
}
__device__ __forceinline__ float low_half(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high_half(u32 w) { return __uint_as_float(w & 0xffff0000u); }

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
__device__ __forceinline__ Fragment unpacked(const Packed& x) {
    Fragment y;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) y.f[j][r] = at(x, j, r);
    return y;
}
__device__ __forceinline__ void clear(Fragment& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] = 0.f;
}

__device__ __forceinline__ void scale_rows(Fragment& x, const float (&by)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] *= by[r >> 1];
}
__device__ __forceinline__ void add(Fragment& x, const Fragment& y) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] += y.f[j][r];
}
__device__ __forceinline__ void add(Fragment& x, const Packed& y) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] += at(y, j, r);
}
__device__ __forceinline__ void multiply(Fragment& x, float by) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] *= by;
}
// x = a x + b y.
__device__ __forceinline__ void combine(Fragment& x, float a, float b, const Fragment& y) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) x.f[j][r] = a * x.f[j][r] + b * y.f[j][r];
}
__device__ __forceinline__ Packed times(const Fragment& x, const Packed& y) {
    Fragment z;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) z.f[j][r] = x.f[j][r] * at(y, j, r);
    return packed(z);
}
// Byte of element (row, column) of a tile; columns of one piece of 8 lie together.
__device__ __forceinline__ u32 tile_byte(int row, int column) {
    return row * 128 + (((column >> 3) ^ (row & 7)) << 4) + (column & 7) * 2;
}

__device__ __forceinline__ void store_tile(char* tile, const Packed& x) {
    int g = own_row();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int c = own_column(j);
        *(u32*)(tile + tile_byte(g, c)) = x.w[j][0];
        *(u32*)(tile + tile_byte(g + 8, c)) = x.w[j][1];
    }
}

// Writes to tiles by the threads, seen by the matrix units after the barrier.
__device__ __forceinline__ void tiles_ready() {
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

#if WGMMA
// The place of a tile, for the matrix units: 128-byte rows swizzled in groups of 8 rows, 1024 bytes apart.
__device__ __forceinline__ u64 describe(const char* tile) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void settle(Fragment& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        asm volatile("" : "+f"(x.f[j][0]), "+f"(x.f[j][1]), "+f"(x.f[j][2]), "+f"(x.f[j][3])::"memory");
}
template <int TA, int TB>
__device__ __forceinline__ void matrix_step(Fragment& d, u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;\n}"
        : "+f"(d.f[0][0]), "+f"(d.f[0][1]), "+f"(d.f[0][2]), "+f"(d.f[0][3]), "+f"(d.f[1][0]), "+f"(d.f[1][1]),
          "+f"(d.f[1][2]), "+f"(d.f[1][3]), "+f"(d.f[2][0]), "+f"(d.f[2][1]), "+f"(d.f[2][2]), "+f"(d.f[2][3]),
          "+f"(d.f[3][0]), "+f"(d.f[3][1]), "+f"(d.f[3][2]), "+f"(d.f[3][3])
        : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}
// Begin sum = A B or, with ADD, sum += A B, where A is tile a or, with TA, its transpose; B likewise.
template <bool TA, bool TB, bool ADD = true>
__device__ __forceinline__ void begin_product(Fragment& sum, const char* a, const char* b) {
    u64 x = describe(a), y = describe(b) + (TB ? 32 * 128 : 32 * 2) / 16 * (threadIdx.x >> 7);
    settle(sum);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k)
        matrix_step<TA, !TB>(sum, x + k * (TA ? 128 : 2), y + k * (TB ? 2 : 128), ADD || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    settle(sum);
}
// All products that were begun are there.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
#else
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <bool TA, bool TB, bool ADD = true>
__device__ __forceinline__ void begin_product(Fragment& sum, const char* a, const char* b) {
    int lane = lane_id(), i = lane >> 3, r = lane & 7;
    u32 a0 = shared_address(a), b0 = shared_address(b);
    int m = warp_row(), n = warp_column();
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
        for (int j = 0; j < 4; ++j) multiply_add(sum.f[j], x, y[j >> 1][2 * (j & 1)], y[j >> 1][2 * (j & 1) + 1]);
    }
}
__device__ __forceinline__ void end_products() {}
__device__ __forceinline__ void settle(Fragment&) {}
#endif
template <bool TA, bool TB, bool ADD = false>
__device__ __forceinline__ void product(Fragment& sum, const char* a, const char* b) {
    begin_product<TA, TB, ADD>(sum, a, b);
    end_products();
    settle(sum);
}

// Four threads that share rows trade words, so that thread t has the four of group t, and back.
__device__ __forceinline__ void turn(u32 (&w)[4]) {
    int t = lane_id() & 3;
    bool odd = t & 1, high = t & 2;
    u32 x = odd ? w[0] : w[1], y = odd ? w[2] : w[3];
    x = __shfl_xor_sync(0xffffffffu, x, 1);
    y = __shfl_xor_sync(0xffffffffu, y, 1);
    if (odd) { w[0] = x; w[2] = y; } else { w[1] = x; w[3] = y; }
    x = high ? w[0] : w[2];
    y = high ? w[1] : w[3];
    x = __shfl_xor_sync(0xffffffffu, x, 2);
    y = __shfl_xor_sync(0xffffffffu, y, 2);
    if (high) { w[0] = x; w[1] = y; } else { w[2] = x; w[3] = y; }
}

// A fragment in global memory, rows `stride` numbers apart: 16 bytes to a thread and row.
__device__ __forceinline__ void store_global(bf16* base, int stride, const Packed& x) {
    int column = warp_column() + 8 * (lane_id() & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 w[4] = {x.w[0][h], x.w[1][h], x.w[2][h], x.w[3][h]};
        turn(w);
        // In so many words, or the compiler makes four stores of it.
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(base + (own_row() + 8 * h) * stride + column),
                     "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    }
}
struct Lines {
    uint4 row[2];
};
__device__ __forceinline__ Lines load_lines(const bf16* base, int stride) {
    Lines x;
    int column = warp_column() + 8 * (lane_id() & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) x.row[h] = *(const uint4*)(base + (own_row() + 8 * h) * stride + column);
    return x;
}
__device__ __forceinline__ Packed from_lines(const Lines& x) {
    Packed y;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 w[4] = {x.row[h].x, x.row[h].y, x.row[h].z, x.row[h].w};
        turn(w);
#pragma unroll
        for (int j = 0; j < 4; ++j) y.w[j][h] = w[j];
    }
    return y;
}
__device__ __forceinline__ void store_floats(float* base, int stride, const Fragment& x) {
    int g = own_row();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int c = own_column(j);
        *(float2*)(base + g * stride + c) = make_float2(x.f[j][0], x.f[j][1]);
        *(float2*)(base + (g + 8) * stride + c) = make_float2(x.f[j][2], x.f[j][3]);
    }
}
__device__ __forceinline__ Fragment load_floats(const float* base, int stride) {
    Fragment x;
    int g = own_row();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int c = own_column(j);
        float2 a = *(const float2*)(base + g * stride + c), b = *(const float2*)(base + (g + 8) * stride + c);
        x.f[j][0] = a.x; x.f[j][1] = a.y; x.f[j][2] = b.x; x.f[j][3] = b.y;
    }
    return x;
}
// A fragment that only its own thread reads again, in 16 KiB of shared memory.
__device__ __forceinline__ void store_private(float* place, const Fragment& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        *(float4*)(place + (j * THREADS + threadIdx.x) * 4) = make_float4(x.f[j][0], x.f[j][1], x.f[j][2], x.f[j][3]);
}
__device__ __forceinline__ Fragment load_private(const float* place) {
    Fragment x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float4 v = *(const float4*)(place + (j * THREADS + threadIdx.x) * 4);
        x.f[j][0] = v.x; x.f[j][1] = v.y; x.f[j][2] = v.z; x.f[j][3] = v.w;
    }
    return x;
}

// Rows of 64 numbers from global memory, a tile's two pieces of 16 bytes to a thread; rows from `rows` on are 0.
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
// The same without registers in between, in the background; the rows are all there.
__device__ __forceinline__ void copy_pieces(char* tile, const bf16* base, int stride) {
    u32 address = shared_address(tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int place = threadIdx.x + h * THREADS, row = place >> 3, column = (place & 7) * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + tile_byte(row, column)),
                     "l"(base + row * stride + column) : "memory");
    }
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last `but` groups of copies are there.
template <int but>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
}
__device__ __forceinline__ u32 sum_words(u32 x, u32 y) {
    return pack(low_half(x) + low_half(y), high_half(x) + high_half(y));
}
__device__ __forceinline__ Pieces sum_pieces(const Pieces& x, const Pieces& y) {
    Pieces z;
#pragma unroll
    for (int h = 0; h < 2; ++h)
        z.piece[h] = make_uint4(sum_words(x.piece[h].x, y.piece[h].x), sum_words(x.piece[h].y, y.piece[h].y),
                                sum_words(x.piece[h].z, y.piece[h].z), sum_words(x.piece[h].w, y.piece[h].w));
    return z;
}

// phi(z), phi'(z), phi''(z). The normal distribution by Abramowitz and Stegun's 7.1.26, exact to 1e-7, whose
// exponential is that of the density.
__device__ __forceinline__ void activate(float z, float& value, float& slope, float& curvature) {
    if (ACTIVATION == 0) {
        float e = __expf(-0.5f * z * z), t = __fdividef(1.f, 1.f + 0.23164189f * fabsf(z));
        float tail = 0.5f * e * t *
                     (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
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

// --- the programs of one walk: a cluster, SPLIT of them ---

// What a program waits for: bytes that others put into its shared memory.
struct Arrival {
    u64* barrier;
    u32 bytes, parity;
};
__device__ __forceinline__ void expect(const Arrival& x) {
    if (threadIdx.x == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(x.barrier)),
                     "r"(x.bytes) : "memory");
}
// Once in a kernel, by all programs of the cluster.
__device__ __forceinline__ void prepare(Arrival& x, Arrival& y) {
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(x.barrier)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(y.barrier)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    expect(x);
    expect(y);
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Wait, and expect the next. The sender of the next has, by then, something from all threads of this program.
__device__ __forceinline__ void await(Arrival& x) {
    asm volatile("{\n.reg .pred p;\nWAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra WAIT;\n}" ::"r"(shared_address(x.barrier)), "r"(x.parity) : "memory");
    x.parity ^= 1;
    expect(x);
}
// What has arrived is for the matrix units, too.
__device__ __forceinline__ void arrived() {
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// The address of `p`, a place in shared memory, in the program `rank` of the cluster.
__device__ __forceinline__ u32 remote(const void* p, int rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
    return r;
}
__device__ __forceinline__ void push(u32 address, u32 x, u32 y, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "r"(x), "r"(y), "r"(barrier) : "memory");
}

// Sums over the hidden width: each program has the sum's rows s ROWS .. + ROWS to itself. An inbox is float32
// [SPLIT, ROWS, 64], its pieces of 32 bytes swizzled.
static const int ROWS = TILE / SPLIT;

__device__ __forceinline__ int inbox_float(int source, int row, int column) {
    return (source * ROWS + row) * TILE + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}
__device__ __forceinline__ void push_rows(const float* inbox, const Arrival& arrival, int source, const Fragment& x) {
    int owner = warp_row() / ROWS, g = own_row() - owner * ROWS;
    u32 base = remote(inbox, owner), barrier = remote(arrival.barrier, owner);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            push(base + 4 * inbox_float(source, g + 8 * h, own_column(j)), __float_as_uint(x.f[j][2 * h]),
                 __float_as_uint(x.f[j][2 * h + 1]), barrier);
}
// Four columns of a row to each thread, sixteen threads to a row: the sum over the sources.
__device__ __forceinline__ float4 gather_row(const float* inbox, int row, int column) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int source = 0; source < SPLIT; ++source) {
        float4 x = *(const float4*)(inbox + inbox_float(source, row, column));
        sum.x += x.x; sum.y += x.y; sum.z += x.z; sum.w += x.w;
    }
    return sum;
}
__device__ __forceinline__ void push_everywhere(char* tile, const Arrival& arrival, int row, int column, u32 x, u32 y) {
    u32 offset = tile_byte(row, column);
#pragma unroll
    for (int rank = 0; rank < SPLIT; ++rank)
        push(remote(tile, rank) + offset, x, y, remote(arrival.barrier, rank));
}
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int d = 1; d < 16; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float row_sum(float4 x) { return row_sum(x.x + x.y + x.z + x.w); }
__device__ __forceinline__ float4 four(u32 x, u32 y) {
    return make_float4(low_half(x), high_half(x), low_half(y), high_half(y));
}
