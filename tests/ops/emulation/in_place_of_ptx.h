// The functions of tiles.cuh and cluster.cuh that are PTX, in C++. Comes after the types of tiles.cuh.

inline u32 shared_address(const void* p) {
    return (u32)((const char*)p - arena.data());
}
inline u32 remote(const void* p, int rank) {
    return (u32)(shared_address(p) + (rank - block_of()) * ROOM);
}
inline u32 half(float x) {
    u32 w = __float_as_uint(x);
    return (w & 0x7fffffff) > 0x7f800000 ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) {
    return half(low) | half(high) << 16;
}
inline void store_tile(char* tile, const Packed& x) {
    for (int j = 0; j < 4; ++j)
        for (int h = 0; h < 2; ++h) *(u32*)(tile + tile_byte(own_row() + 8 * h, own_column(j))) = x.w[j][h];
}
inline void tiles_ready() {
    __syncthreads();
}
inline float element(const char* tile, int row, int column) {
    return __uint_as_float((u32) * (const bf16*)(tile + tile_byte(row, column)) << 16);
}
template <bool TA, bool TB, bool ADD>
void begin_product(Fragment& sum, const char* a, const char* b, int side) {
    for (int j = 0; j < 4; ++j)
        for (int r = 0; r < 4; ++r) {
            int row = own_row() + 8 * (r >> 1), column = own_column(j) % 32 + 32 * side + (r & 1);
            float total = ADD ? sum.f[j][r] : 0.f;
            for (int k = 0; k < TILE; ++k)
                total += (TA ? element(a, k, row) : element(a, row, k)) *
                         (TB ? element(b, column, k) : element(b, k, column));
            sum.f[j][r] = total;
        }
}
inline void end_products() {}

// An mbarrier of one arrival: bytes to come, whether it has arrived, and the phase.
struct Counter {
    int bytes;
    short arrived, phase;
};
static_assert(sizeof(Counter) == 8);
inline void count(Counter* c, int bytes, int arrivals) {
    ++moves;
    c->bytes += bytes, c->arrived += arrivals;
    if (c->arrived == 1 && c->bytes == 0) c->arrived = 0, c->phase ^= 1;
}
inline void prepare(const Arrival& x) {
    memset((void*)x.barrier, 0, 8);
}
inline void prepared() {}
inline void expect(const Arrival& x) {
    count((Counter*)x.barrier, x.bytes, 1);
}
inline void await(Arrival& x) {
    while ((u32)((Counter*)x.barrier)->phase == x.parity) rest();
    x.parity ^= 1;
}
inline void fetch(char* tile, const bf16* from, const Arrival& arrival) {
    memcpy(tile, from, TILE_BYTES);
    count((Counter*)arrival.barrier, -TILE_BYTES, 0);
}
inline void send(bf16* to, const char* tile) {
    memcpy(to, tile, TILE_BYTES);
}
inline void sent() {}
inline void bring(const void*, int = 0) {}
inline void push(u32 address, u32 x, u32 y, u32 barrier) {
    u32 pair[2] = {x, y};
    memcpy(arena.data() + address, pair, 8);
    count((Counter*)(arena.data() + barrier), -8, 0);
}
