// What is PTX. Tests on a CPU have C++ in the place of this file.

typedef unsigned int u32;
typedef unsigned short bf16;

// The nearest number that TF32 has.
__device__ __forceinline__ float rounded(float x) {
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return __uint_as_float(r);
}
// Two numbers as bfloat16.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
    return w;
}
// sum += A B for A of 16 rows and B of 8 columns, over 8 numbers; see rows.cuh for who has what.
__device__ __forceinline__ void multiply_add(float (&sum)[4], float a0, float a1, float a2, float a3,
                                             float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// 16 bytes from global to shared memory in the background, or zeros where they are not there.
__device__ __forceinline__ void copy_piece(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
// The thread's own copies are there.
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// A barrier of `count` threads, of which some only say that they have come to it.
__device__ __forceinline__ void come(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void await(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
