// The writes of a two-layer memory, forward: `write_kernel` of ../write.py for heads and chunks of 64 in bfloat16.
//
// A cluster of SPLIT programs walks one sequence and head; each has 64 columns of W1 and rows of W2, with their
// momentum, in registers and shared memory from chunk to chunk. z_2 is a sum over the programs: each sends its
// part to the owners of the rows, and an owner sends the step u_2 of its rows to all.
// tiles.cuh stands before this file, and definitions of ACTIVATION, NORM, LOSS, MOMENTUM, TARGET, HAS_RESETS,
// HAS_OPEN, SAVE and SPLIT before that.

static const int HIDDEN = SPLIT * TILE;
static const int SIZE = TILE * HIDDEN;
static const int PARTS = MOMENTUM ? 4 : 2;

struct State {
    Fragment w1, w2;
    float *s1, *s2;  // `store_private`
};

__device__ __forceinline__ void load_state(State& x, const float* base, int s) {
    x.w1 = load_floats(base + s * TILE, HIDDEN);
    x.w2 = load_floats(base + SIZE + s * TILE * TILE, TILE);
    if (MOMENTUM) {
        store_private(x.s1, load_floats(base + 2 * SIZE + s * TILE, HIDDEN));
        store_private(x.s2, load_floats(base + 3 * SIZE + s * TILE * TILE, TILE));
    }
}
__device__ __forceinline__ void save_state(const State& x, float* base, int s) {
    store_floats(base + s * TILE, HIDDEN, x.w1);
    store_floats(base + SIZE + s * TILE * TILE, TILE, x.w2);
    if (MOMENTUM) {
        store_floats(base + 2 * SIZE + s * TILE, HIDDEN, load_private(x.s1));
        store_floats(base + 3 * SIZE + s * TILE * TILE, TILE, load_private(x.s2));
    }
}
// W in the operands' precision, from what the state holds of it.
__device__ __forceinline__ Packed weight(Fragment w, const Lines& target) {
    if (TARGET) add(w, from_lines(target));
    return packed(w);
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, 2) write_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const float* LAST, float* CHECKPOINTS, bf16* STATES,
    bf16* STEPS, bf16* HIDDENS, bf16* ZH, float* NORMS, const bf16* TARGETS, const float* GAMMA,
    const float* BETA, const float* START, const unsigned char* RESETS, const int* OPEN, float* ANCHOR,
    long kb, long kt, long kh, long vb, long vt, long vh, int walks, int heads, int chunks, int tokens,
    int first_chunk, int span, int interval, int rows, float eps, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    char *k_tile = shared, *w1_tile = k_tile + TILE_BYTES, *w2_tile = w1_tile + TILE_BYTES,
         *x_tile = w2_tile + TILE_BYTES, *xg_tile = x_tile + TILE_BYTES, *xe_tile = xg_tile + TILE_BYTES,
         *u2_tile = xe_tile + TILE_BYTES, *ue_tile = u2_tile + TILE_BYTES;
    float* inbox = (float*)(ue_tile + TILE_BYTES);
    State state;
    state.s1 = inbox + TILE * TILE;
    state.s2 = state.s1 + TILE * TILE;
    float* norm = MOMENTUM ? state.s2 + TILE * TILE : state.s1;
    Arrival parts = {(u64*)(norm + 2 * TILE), TILE * TILE * 4, 0}, steps = {parts.barrier + 1, TILE_BYTES, 0};

    int s = blockIdx.x % SPLIT, group = blockIdx.x / SPLIT, m = group % walks, piece = group / walks;
    int b = m / heads, h = m % heads;
    int begin = first_chunk + piece * rows, end = min(min(begin + rows, first_chunk + span), chunks);
    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    const bf16 *target1 = TARGETS + (long)h * 2 * SIZE + s * TILE,
               *target2 = TARGETS + (long)h * 2 * SIZE + SIZE + s * TILE * TILE;
    // The rows whose sums this program owns: sixteen threads to a row, sixteen rows at a time.
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;

    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    load_state(state, CHECKPOINTS + ((long)(begin / interval) * walks + m) * PARTS * SIZE, s);
    Pieces next = load_pieces(k_at + (long)begin * TILE * kt, kt, tokens - begin * TILE);
    Lines m1, m2;
    if (TARGET) m1 = load_lines(target1, HIDDEN), m2 = load_lines(target2, TILE);
    prepare(parts, steps);

    for (int n = begin; n < end; ++n) {
        if (HAS_RESETS && RESETS[b * chunks + n]) load_state(state, START + (long)h * PARTS * SIZE, s);
        if (SAVE && n % interval == 0)
            save_state(state, CHECKPOINTS + ((long)(n / interval) * walks + m) * PARTS * SIZE, s);
        if (HAS_OPEN && n == OPEN[b]) {
            float* anchor = ANCHOR + (long)m * 2 * SIZE;
            store_floats(anchor + s * TILE, HIDDEN, state.w1);
            store_floats(anchor + SIZE + s * TILE * TILE, TILE, state.w2);
        }
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        store_pieces(k_tile, next);
        store_tile(w1_tile, weight(state.w1, m1));
        store_tile(w2_tile, weight(state.w2, m2));
        tiles_ready();

        // What comes from memory is under way while the first product is computed.
        uint2 values[ROWS / 16];
#pragma unroll
        for (int r = 0; r < ROWS / 16; ++r) {
            int t = n * TILE + s * ROWS + r * 16 + own;
            values[r] = make_uint2(0, 0);
            if (t < tokens) values[r] = *(const uint2*)(v_at + t * vt + column);
        }
        if (n + 1 < end) next = load_pieces(k_at + (long)(n + 1) * TILE * kt, kt, tokens - (n + 1) * TILE);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];

        Fragment z;
        product<false, false>(z, k_tile, w1_tile);
        Packed x, slope, curvature;
        {
            Fragment slopes, curvatures;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) activate(z.f[j][r], z.f[j][r], slopes.f[j][r], curvatures.f[j][r]);
            x = packed(z);
            slope = packed(slopes);
            if (!SAVE) curvature = packed(curvatures);
        }
        store_tile(x_tile, x);
        {
            Fragment scaled;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) scaled.f[j][r] = at(x, j, r) * g_end[r >> 1];
            store_tile(xg_tile, packed(scaled));
            if (MOMENTUM) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) scaled.f[j][r] = at(x, j, r) * e_end[r >> 1];
                store_tile(xe_tile, packed(scaled));
            }
        }
        tiles_ready();
        product<false, false>(z, x_tile, w2_tile);
        push_rows(inbox, parts, s, z);
        // While the parts travel, the state at the chunk's start goes to memory.
        bf16* out = STATES + here * PARTS * SIZE;
        store_global(out + s * TILE, HIDDEN, packed(state.w1));
        store_global(out + SIZE + s * TILE * TILE, TILE, packed(state.w2));
        if (MOMENTUM) {
            store_global(out + 2 * SIZE + s * TILE, HIDDEN, packed(load_private(state.s1)));
            store_global(out + 3 * SIZE + s * TILE * TILE, TILE, packed(load_private(state.s2)));
        }
        bf16* wide = HIDDENS + here * TILE * HIDDEN + s * TILE;
        long kind = (long)walks * span * TILE * HIDDEN;
        if (!SAVE) {
            store_global(wide, HIDDEN, x);
            store_global(wide + kind, HIDDEN, slope);
        }
        await(parts);

#pragma unroll
        for (int r = 0; r < ROWS / 16; ++r) {
            int row = r * 16 + own, t = s * ROWS + row;
            float4 z2 = gather_row(inbox, row, column), v = four(values[r].x, values[r].y);
            uint2 kw = *(const uint2*)(k_tile + tile_byte(t, column));
            float4 k = four(kw.x, kw.y), gamma = make_float4(1.f, 1.f, 1.f, 1.f), f = z2;
            float inverse = 1.f;
            if (NORM == 2) {
                float mean = row_sum(z2) * (1.f / TILE);
                z2 = make_float4(z2.x - mean, z2.y - mean, z2.z - mean, z2.w - mean);
                inverse = rsqrtf(row_sum(z2.x * z2.x + z2.y * z2.y + z2.z * z2.z + z2.w * z2.w) * (1.f / TILE) + eps);
                z2 = make_float4(z2.x * inverse, z2.y * inverse, z2.z * inverse, z2.w * inverse);
                gamma = *(const float4*)(norm + column);
                float4 beta = *(const float4*)(norm + TILE + column);
                f = make_float4(k.x + gamma.x * z2.x + beta.x, k.y + gamma.y * z2.y + beta.y,
                                k.z + gamma.z * z2.z + beta.z, k.w + gamma.w * z2.w + beta.w);
            } else if (NORM == 1) {
                f = make_float4(k.x + z2.x, k.y + z2.y, k.z + z2.z, k.w + z2.w);
            }
            float e[4] = {f.x - v.x, f.y - v.y, f.z - v.z, f.w - v.w};
            if (LOSS == 1) e[0] = -v.x, e[1] = -v.y, e[2] = -v.z, e[3] = -v.w;
            if (LOSS == 2)
#pragma unroll
                for (int c = 0; c < 4; ++c) e[c] = fminf(fmaxf(e[c], -threshold), threshold);
            float4 w = make_float4(e[0] * scale * gamma.x, e[1] * scale * gamma.y, e[2] * scale * gamma.z,
                                   e[3] * scale * gamma.w);
            float along = row_sum(w.x * z2.x + w.y * z2.y + w.z * z2.z + w.w * z2.w);
            if (NORM == 2) {
                float mean = row_sum(w) * (1.f / TILE), part = along * (1.f / TILE);
                w = make_float4((w.x - mean - z2.x * part) * inverse, (w.y - mean - z2.y * part) * inverse,
                                (w.z - mean - z2.z * part) * inverse, (w.w - mean - z2.w * part) * inverse);
            }
            u32 u0 = pack(-w.x, -w.y), u1 = pack(-w.z, -w.w);
            push_everywhere(u2_tile, steps, t, column, u0, u1);
            long narrow = here * TILE * TILE + t * TILE + column;
            *(uint2*)(STEPS + narrow) = make_uint2(u0, u1);
            if (!SAVE) {
                *(uint2*)(ZH + narrow) = make_uint2(pack(z2.x, z2.y), pack(z2.z, z2.w));
                if (column == 0) {
                    NORMS[here * 2 * TILE + t] = inverse;
                    NORMS[here * 2 * TILE + TILE + t] = along;
                }
            }
        }
        await(steps);
        arrived();
        product<false, true>(z, u2_tile, w2_tile);
        Packed u = packed(z);
        {
            Fragment scaled;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) scaled.f[j][r] = z.f[j][r] * at(slope, j, r);
            u = packed(scaled);
            if (!SAVE) {
                store_global(wide + 2 * kind, HIDDEN, u);
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) scaled.f[j][r] = z.f[j][r] * at(curvature, j, r);
                store_global(wide + 3 * kind, HIDDEN, packed(scaled));
            }
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) scaled.f[j][r] = at(u, j, r) * g_end[r >> 1];
            store_tile(x_tile, packed(scaled));
            if (MOMENTUM) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) scaled.f[j][r] = at(u, j, r) * e_end[r >> 1];
                store_tile(ue_tile, packed(scaled));
            }
        }
        tiles_ready();
        if (MOMENTUM) {
            Fragment s1 = load_private(state.s1), s2 = load_private(state.s2);
            combine(state.w1, A, F, s1);
            combine(state.w2, A, F, s2);
            multiply(s1, decay);
            multiply(s2, decay);
            begin_product<true, false>(s1, k_tile, ue_tile);
            begin_product<true, false>(s2, xe_tile, u2_tile);
            begin_product<true, false>(state.w1, k_tile, x_tile);
            begin_product<true, false>(state.w2, xg_tile, u2_tile);
            if (TARGET) m1 = load_lines(target1, HIDDEN), m2 = load_lines(target2, TILE);
            end_products();
            settle(s1);
            settle(s2);
            store_private(state.s1, s1);
            store_private(state.s2, s2);
        } else {
            multiply(state.w1, A);
            multiply(state.w2, A);
            begin_product<true, false>(state.w1, k_tile, x_tile);
            begin_product<true, false>(state.w2, xg_tile, u2_tile);
            if (TARGET) m1 = load_lines(target1, HIDDEN), m2 = load_lines(target2, TILE);
            end_products();
        }
        settle(state.w1);
        settle(state.w2);
        __syncthreads();
    }
    if (SAVE)
        save_state(state, CHECKPOINTS + ((long)((end + interval - 1) / interval) * walks + m) * PARTS * SIZE, s);
}
