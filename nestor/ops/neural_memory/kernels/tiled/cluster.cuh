// The programs of one walk: a cluster; each has SLICES of the hidden width's SPLIT slices. A sum over the hidden width is a sum over the programs: each has
// ROWS rows of the sum to itself, which the others send to its inbox, float32 [CLUSTER, ROWS, 64] with its pieces of
// 32 bytes swizzled. Sixteen threads work on a row.

#define EACH_SLICE _Pragma("unroll") for (int i = 0; i < SLICES; ++i)
static const int CLUSTER = SPLIT / SLICES;
static const int ROWS = TILE / CLUSTER;
static const int TURNS = ROWS / 16;
static const int INBOX_BYTES = NUMBERS * 4;

// Both from threads of all programs; the sender of the next has, by then, something from all threads of this one.
__device__ __forceinline__ void prepare_walk(const Arrival& x, const Arrival& y) {
    if (threadIdx.x == 0) {
        prepare(x);
        prepare(y);
        prepared();
        expect(x);
        expect(y);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void await_and_expect(Arrival& x) {
    await(x);
    if (threadIdx.x == 0) expect(x);
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
// Four columns of a row of the sum.
__device__ __forceinline__ float4 gather_row(const float* inbox, int row, int column) {
    float4 sum = *(const float4*)(inbox + inbox_float(0, row, column));
#pragma unroll
    for (int source = 1; source < CLUSTER; ++source) sum = sum + *(const float4*)(inbox + inbox_float(source, row, column));
    return sum;
}
__device__ __forceinline__ void push_everywhere(char* tile, const Arrival& arrival, int row, int column, uint2 x) {
    u32 offset = tile_byte(row, column);
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) push(remote(tile, rank) + offset, x.x, x.y, remote(arrival.barrier, rank));
}
// What has arrived is for the matrix units, too.
__device__ __forceinline__ void arrived() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
