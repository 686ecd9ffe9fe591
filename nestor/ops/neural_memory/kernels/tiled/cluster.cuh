// The programs of one walk; each has SLICES of the hidden width's SPLIT slices. A sum over the hidden width
// is a sum over the programs: each owns ROWS rows of it, to which the others send their parts, and sends what
// it makes of them to all. Sixteen threads work on a row.
//
// They are a cluster and write into each other's shared memory, where arriving bytes are counted; or,
// IN_MEMORY, they run anywhere and meet in global memory, where each word comes with the number of the turn:
// a reader waits until it finds this turn's. A cluster is faster, but finds room only where enough
// multiprocessors are neighbours.

#define EACH_SLICE _Pragma("unroll") for (int i = 0; i < SLICES; ++i)
static const int PROGRAMS = SPLIT / SLICES;
static const int CLUSTER = IN_MEMORY ? 1 : PROGRAMS;
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
// A pair of words with their turn, twice; to be written and read as one.
__device__ __forceinline__ void leave(uint4* place, u32 x, u32 y, u32 turn) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(place), "r"(x), "r"(turn), "r"(y)
                 : "memory");
}
__device__ __forceinline__ uint4 look(const uint4* place) {
    uint4 x;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(place)
                 : "memory");
    return x;
}
// The pairs at N places, `at(i)` for each i. All are asked for at once, until all are there; before that
// `late`, one of another program, is waited for alone: threads that ask for all again and again are in the
// way of those that write.
template <int N, typename Places>
__device__ __forceinline__ void find(uint2 (&pairs)[N], u32 turn, int late, Places at) {
    while (look(at(late)).w != turn) {
    }
    bool found;
    do {
        uint4 x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = look(at(i));
        found = true;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            found = found && x[i].y == turn && x[i].w == turn;
            pairs[i] = make_uint2(x[i].x, x[i].z);
        }
    } while (!found);
}

// What MEETING has in front of the walks' places: the number of programs that have begun.
static const int TICKET = 16;
// Pairs of words of a walk: parts of sums from each program, and what is made of them, for even and for odd
// turns. A place is free again after two turns: who begins a turn has something of the turn before from all.
static const int PART_PAIRS = PROGRAMS * NUMBERS / 2;
static const int MADE_PAIRS = NUMBERS / 4;

// The number of this program: in the order in which they begin if they meet in memory, so that those which a
// program waits for run already, or will without it.
__device__ __forceinline__ int program_number(uint4* meeting, char* shared) {
    if (!IN_MEMORY) return blockIdx.x;
    if (threadIdx.x == 0) *(u32*)shared = atomicAdd((u32*)meeting, 1);
    __syncthreads();
    int number = *(volatile u32*)shared;
    __syncthreads();
    return number;
}

struct Exchange {
    float* inbox;         // float32 [PROGRAMS, ROWS, 64], its pieces of 32 bytes swizzled
    Arrival parts, made;  // in a cluster
    uint4* meeting;       // in memory: the walk's place
    u32 turn;

    __device__ __forceinline__ Exchange(float* inbox, u64* barriers, uint4* meeting, int walk)
        : inbox(inbox),
          parts{barriers, INBOX_BYTES, 0},
          made{barriers + 1, TILE_BYTES, 0},
          meeting(meeting + TICKET + (long)walk * 2 * (PART_PAIRS + MADE_PAIRS)),
          turn(1) {}

    // By all threads, after other arrivals are prepared.
    __device__ __forceinline__ void prepare_all() {
        if (threadIdx.x == 0) {
            if (!IN_MEMORY) prepare(parts), prepare(made);
            prepared();
            if (!IN_MEMORY) expect(parts), expect(made);
        }
        if (IN_MEMORY)
            __syncthreads();
        else
            asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                             : "memory");
    }
    __device__ __forceinline__ uint4* part_place(int source, int row, int column) const {
        return meeting + (turn & 1) * PART_PAIRS + (source * TILE + row) * (TILE / 2) + column / 2;
    }
    __device__ __forceinline__ uint4* made_place(u32 byte) const {
        return meeting + 2 * PART_PAIRS + (turn & 1) * MADE_PAIRS + byte / 8;
    }
    __device__ __forceinline__ static int inbox_float(int source, int row, int column) {
        return (source * ROWS + row) * TILE + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
    }
    // To the owners of the rows, from the program `source`.
    __device__ __forceinline__ void send_part(int source, const Fragment& x) {
        int owner = warp_row() / ROWS, g = own_row() - owner * ROWS;
        u32 base = 0, barrier = 0;
        if (!IN_MEMORY) base = remote(inbox, owner), barrier = remote(parts.barrier, owner);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 one = __float_as_uint(x.f[j][2 * h]), other = __float_as_uint(x.f[j][2 * h + 1]);
                if (IN_MEMORY)
                    leave(part_place(source, own_row() + 8 * h, own_column(j)), one, other, turn);
                else
                    push(base + 4 * inbox_float(source, g + 8 * h, own_column(j)), one, other, barrier);
            }
    }
    __device__ __forceinline__ void await_parts() {
        if (!IN_MEMORY) await_and_expect(parts);
    }
    // Four columns of a row of the sum; `row` of those that the program `owner`, this one, owns.
    __device__ __forceinline__ float4 sum_of_row(int owner, int row, int column) const {
        float4 sum;
        uint2 pairs[2 * PROGRAMS];
        if (IN_MEMORY)
            find(pairs, turn, 2 * ((owner + 1) % PROGRAMS),
                 [&](int i) { return part_place(i >> 1, owner * ROWS + row, column) + (i & 1); });
#pragma unroll
        for (int source = 0; source < PROGRAMS; ++source) {
            uint2 one = pairs[2 * source], other = pairs[2 * source + 1];
            float4 x = make_float4(__uint_as_float(one.x), __uint_as_float(one.y), __uint_as_float(other.x),
                                   __uint_as_float(other.y));
            if (!IN_MEMORY) x = *(const float4*)(inbox + inbox_float(source, row, column));
            sum = source ? sum + x : x;
        }
        return sum;
    }
    // Four columns of a row of what is made of the sums, to the same place of a tile of all.
    __device__ __forceinline__ void send_made(const char* tile, int row, int column, uint2 x) {
        u32 byte = tile_byte(row, column);
        if (IN_MEMORY) leave(made_place(byte), x.x, x.y, turn);
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank)
            if (!IN_MEMORY) push(remote(tile, rank) + byte, x.x, x.y, remote(made.barrier, rank));
    }
    // The whole tile has arrived, also for the matrix units; ends the turn of the program `rank`, this one.
    __device__ __forceinline__ void await_made(int rank, char* tile) {
        if (IN_MEMORY) {
            // Sixteen rows at a time.
            uint2 pairs[MADE_PAIRS / THREADS];
            find(pairs, turn, (rank + 1) % PROGRAMS * TURNS,
                 [&](int i) { return made_place((threadIdx.x + i * THREADS) * 8); });
#pragma unroll
            for (int i = 0; i < MADE_PAIRS / THREADS; ++i)
                ((uint2*)tile)[threadIdx.x + i * THREADS] = pairs[i];
            tiles_ready();
        } else {
            await_and_expect(made);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        ++turn;
    }
};
