// In the place of instructions.cuh of nestor/ops/self_modifying/kernels/tiled. Products take numbers as they
// are, so that what differs from the chunked form is wrong; with TF32 they are to be rounded. Copies are done
// when they begin or, with LATE, when they are waited for: both may happen.

typedef unsigned int u32;
typedef unsigned short bf16;

inline float rounded(float x) {
    return TF32 ? __uint_as_float(__float_as_uint(x) + 0x1000 & 0xffffe000) : x;
}
// What is not rounded is no operand, and no number.
inline float operand(float x) {
    return TF32 && __float_as_uint(x) & 0x1fff ? NAN : x;
}
inline u32 half(float x) {
    u32 w = __float_as_uint(x);
    return (w & 0x7fffffff) > 0x7f800000 ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) {
    return half(low) | half(high) << 16;
}

struct Operands {
    float a[4], b[2];
};
static Operands operands[BLOCK];
inline void multiply_add(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
    Meeting& warp = warps[running->number / WARP];
    operands[running->number] = {operand(a0), operand(a1), operand(a2),
                                 operand(a3), operand(b0), operand(b1)};
    meet(warp);
    const Operands* all = operands + running->number / WARP * WARP;
    int lane = running->number % WARP;
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8; ++k)
            sum[i] += all[row * 4 + k % 4].a[i / 2 + k / 4 * 2] * all[column * 4 + k % 4].b[k / 4];
    }
    meet(warp);
}

struct Copy {
    void* to;
    const void* from;
    bool there;
};
static std::vector<Copy> copies[BLOCK];
inline void copy(const Copy& x) {
    if (x.there)
        memcpy(x.to, x.from, 16);
    else
        memset(x.to, 0, 16);
}
inline void copy_piece(void* to, const void* from, bool there) {
    if (LATE)
        copies[running->number].push_back({to, from, there});
    else
        copy({to, from, there});
}
inline void end_copies() {
    for (const Copy& x : copies[running->number]) copy(x);
    copies[running->number].clear();
}

static Meeting named[16];
inline void come(int barrier, int count) {
    named[barrier].members = count;
    ++moves;
    if (++named[barrier].here == count) named[barrier].here = 0, ++named[barrier].turn;
}
inline void await(int barrier, int count) {
    named[barrier].members = count;
    meet(named[barrier]);
}
