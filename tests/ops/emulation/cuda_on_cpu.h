// What the CUDA kernels of nestor/ops need, on a CPU: the language's names, and in the place of functions in
// PTX what they mean. Threads of a group of blocks take turns, one after the other runs to its next barrier,
// shuffle or wait, so that a missing one is mostly a wrong result; with SHUFFLED sometimes in reverse, or
// those of one warp alone. Copies and products are done when they begin: what a kernel leaves to them too
// early or too late is not found here.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __expf expf
#define rsqrtf(x) (1.f / sqrtf(x))
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __uint_as_float(unsigned w) {
    float x;
    memcpy(&x, &w, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned w;
    memcpy(&w, &x, 4);
    return w;
}
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline long min(long a, long b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
template <typename T>
T __ldcs(const T* p) {
    return *p;
}
template <typename T>
void __stcs(T* p, T x) {
    *p = x;
}

// --- threads ---

struct Place {
    int x, y;
};
static Place threadIdx, blockIdx;
#ifndef THREADS_OF_BLOCK
#define THREADS_OF_BLOCK 256
#endif
#ifndef SHUFFLED
#define SHUFFLED 0
#endif
static const int BLOCK = THREADS_OF_BLOCK, WARP = 32;
static const int PATIENCE = SHUFFLED ? 10000 : 100;  // rounds in which all only look
static const long ROOM = 232 * 1024, STACK = 128 * 1024;

struct Meeting {
    int members, here = 0;
    long turn = 0;
};
struct Thread {
    ucontext_t at;
    Place thread, block;
    int number;
    bool done;
};

static std::vector<Thread> threads;
static std::vector<char> stacks, arena;
static std::vector<Meeting> warps, blocks;
static Meeting cluster;
static std::vector<unsigned> slots;
static ucontext_t scheduler;
static Thread* running;
static unsigned seed = 1;
static long moves;  // so that threads that all wait are found out
static void (*body)();

inline int block_of() {
    return running->number / BLOCK;
}
inline char* block_memory() {
    return arena.data() + block_of() * ROOM;
}
inline void rest() {
    swapcontext(&running->at, &scheduler);
}
inline void meet(Meeting& m) {
    ++moves;
    long turn = m.turn;
    if (++m.here == m.members) {
        m.here = 0, ++m.turn;
        return;
    }
    while (m.turn == turn) rest();
}
inline void __syncthreads() {
    meet(blocks[block_of()]);
}
inline void __syncwarp() {
    meet(warps[running->number / WARP]);
}
inline unsigned exchanged(unsigned x, int other) {
    Meeting& warp = warps[running->number / WARP];
    slots[running->number] = x;
    meet(warp);
    unsigned y = slots[running->number / WARP * WARP + other];
    meet(warp);
    return y;
}
inline float __shfl_xor_sync(unsigned, float x, int d) {
    return __uint_as_float(exchanged(__float_as_uint(x), running->number % WARP ^ d));
}
inline int __shfl_sync(unsigned, int x, int lane) {
    return (int)exchanged((unsigned)x, lane);
}
inline float __shfl_sync(unsigned, float x, int lane) {
    return __uint_as_float(exchanged(__float_as_uint(x), lane));
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
    unsigned y = *p;
    *p += x;
    return y;
}
static thread_local long cluster_turn[4096];
inline void cluster_arrive() {
    ++moves;
    cluster_turn[running->number] = cluster.turn;
    if (++cluster.here == cluster.members) cluster.here = 0, ++cluster.turn;
}
inline void cluster_wait() {
    while (cluster.turn == cluster_turn[running->number]) rest();
}

static void begin_thread() {
    body();
    running->done = true;
    ++moves;
    rest();
}

// Run `kernel` on a grid, `group` blocks at a time; false: its threads wait for each other for ever.
static bool run_grid(int grid_x, int grid_y, int group, void (*kernel)()) {
    body = kernel;
    int count = group * BLOCK;
    threads.resize(count), stacks.resize(count * STACK), arena.resize(group * ROOM + 1024),
        slots.assign(count, 0);
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; x += group) {
            warps.assign(count / WARP, Meeting{WARP});
            blocks.assign(group, Meeting{BLOCK});
            cluster = Meeting{count};
            memset(arena.data(), 0xff, arena.size());  // not a number
            for (int i = 0; i < count; ++i) {
                Thread& t = threads[i];
                t.number = i, t.done = false, t.thread = {i % BLOCK, 0}, t.block = {x + i / BLOCK, y};
                getcontext(&t.at);
                t.at.uc_stack.ss_sp = stacks.data() + i * STACK, t.at.uc_stack.ss_size = STACK,
                t.at.uc_link = nullptr;
                makecontext(&t.at, begin_thread, 0);
            }
            for (int left = count, idle = 0; left;) {
                long before = moves;
                // Of a round: in reverse, or one warp alone.
                seed = seed * 1664525u + 1013904223u;
                const bool reverse = SHUFFLED && seed >> 31, alone = SHUFFLED && seed >> 30 & 1;
                for (int i = 0; i < count; ++i) {
                    Thread& t = threads[reverse ? count - 1 - i : i];
                    if (t.done || (alone && (seed >> 8) % (count / WARP) != t.number / WARP)) continue;
                    running = &t, threadIdx = t.thread, blockIdx = t.block;
                    swapcontext(&scheduler, &t.at);
                    left -= t.done;
                }
                idle = moves == before ? idle + 1 : 0;
                if (idle > PATIENCE) return false;
            }
        }
    return true;
}
