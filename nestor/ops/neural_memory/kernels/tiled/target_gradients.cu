// The gradient of the targets: `target_gradients_kernel` of ../write.py for bfloat16. Eight numbers of one sequence and
// head to a thread, in whatever order AFTER and READS_AT have them.

extern "C" __global__ void __launch_bounds__(THREADS) target_gradients_kernel(
    const float* LAST, const bf16* AFTER, const bf16* READS_AT, float* G_TARGETS, int walks, int heads, int chunks,
    int tokens, int first_chunk, int span) {
    int place = (blockIdx.x * THREADS + threadIdx.x) * 8, here = min(span, chunks - first_chunk);
    long m = blockIdx.y;
    const float* last = LAST + (m * chunks + first_chunk) * 4;
    const bf16 *after = AFTER + m * span * PARTS * SIZE + place, *reads = READS_AT + m * span * 2 * SIZE + place;
    float4* total = (float4*)(G_TARGETS + m * 2 * SIZE + place);
    float4* by_reads = total + (long)walks * 2 * SIZE / 4;
    float4 t0 = total[0], t1 = total[1], r0, r1;
    if (READS) r0 = by_reads[0], r1 = by_reads[1];
#pragma unroll 4
    for (int at = 0; at < here; ++at) {
        float lost = 1.f - last[at * 4];
        uint4 x = *(const uint4*)(after + (long)at * PARTS * SIZE);
        t0 = t0 + four(make_uint2(x.x, x.y)) * lost;
        t1 = t1 + four(make_uint2(x.z, x.w)) * lost;
        if (READS) {
            uint4 y = *(const uint4*)(reads + (long)at * 2 * SIZE);
            r0 = r0 + four(make_uint2(y.x, y.y));
            r1 = r1 + four(make_uint2(y.z, y.w));
        }
    }
    total[0] = t0, total[1] = t1;
    if (READS) by_reads[0] = r0, by_reads[1] = r1;
}
