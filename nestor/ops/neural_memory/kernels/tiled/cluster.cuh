// The programs of one walk, a cluster; each has SLICES of the hidden width's SPLIT slices. A sum over the
// hidden width is a sum over the programs: each owns ROWS rows of it, to which the others send their parts,
// and sends what it makes of them to all, into their shared memory, where arriving bytes are counted. Sixteen
// threads work on a row.

#define EACH_SLICE _Pragma("unroll") for (int i = 0; i < SLICES; ++i)
static const int PROGRAMS = SPLIT / SLICES;
static const int ROWS = TILE / PROGRAMS;
static const int TURNS = ROWS / 16;
static const int INBOX_BYTES = NUMBERS * 4;

__device__ __forceinline__ void await_and_expect(Arrival& x) {
    await(x);
    if (threadIdx.x == 0) expect(x);
}
__device__ __forceinline__ void push(u32 address, u32 x, u32 y, u32 barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            address),
        "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

struct Exchange {
    float* inbox;  // float32 [PROGRAMS, ROWS, 64], its pieces of 32 bytes swizzled
    Arrival parts, made;

    __device__ __forceinline__ Exchange(float* inbox, u64* barriers)
        : inbox(inbox), parts{barriers, INBOX_BYTES, 0}, made{barriers + 1, TILE_BYTES, 0} {}

    // By all threads, after other arrivals are prepared.
    __device__ __forceinline__ void prepare_all() {
        if (threadIdx.x == 0) {
            prepare(parts), prepare(made);
            prepared();
            expect(parts), expect(made);
        }
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                         : "memory");
    }
    __device__ __forceinline__ static int inbox_float(int source, int row, int column) {
        return (source * ROWS + row) * TILE + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
    }
    // To the owners of the rows, from the program `source`.
    __device__ __forceinline__ void send_part(int source, const Fragment& x) {
        int owner = warp_row() / ROWS, g = own_row() - owner * ROWS;
        u32 base = remote(inbox, owner), barrier = remote(parts.barrier, owner);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                push(base + 4 * inbox_float(source, g + 8 * h, own_column(j)), __float_as_uint(x.f[j][2 * h]),
                     __float_as_uint(x.f[j][2 * h + 1]), barrier);
    }
    __device__ __forceinline__ void await_parts() { await_and_expect(parts); }
    // Four columns of a row of the sum; `row` of those that this program owns.
    __device__ __forceinline__ float4 sum_of_row(int row, int column) const {
        float4 sum;
#pragma unroll
        for (int source = 0; source < PROGRAMS; ++source) {
            float4 x = *(const float4*)(inbox + inbox_float(source, row, column));
            sum = source ? sum + x : x;
        }
        return sum;
    }
    // Four columns of a row of what is made of the sums, to the same place of a tile of all.
    __device__ __forceinline__ void send_made(const char* tile, int row, int column, uint2 x) {
        u32 byte = tile_byte(row, column);
#pragma unroll
        for (int rank = 0; rank < PROGRAMS; ++rank)
            push(remote(tile, rank) + byte, x.x, x.y, remote(made.barrier, rank));
    }
    // The whole tile has arrived, also for the matrix units.
    __device__ __forceinline__ void await_made() {
        await_and_expect(made);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
};
