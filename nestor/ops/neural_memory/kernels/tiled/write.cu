// The writes of a two-layer memory, forward: `write_kernel` of ../write.py for heads and chunks of 64 in
// bfloat16.
//
// A group of programs walks one sequence and head; each has SLICES times 64 columns of W1 and rows of W2,
// with their momentum, in registers from chunk to chunk. For z_2 each sends its part to the owners of the
// rows, and an owner sends the step u_2 of its rows to all (see cluster.cuh). W is never put together from
// what a state holds, D, and its target M: products take both.
//
// Order in memory, besides ../write.py's: STATES, STEPS, x_2 and u_1 of HIDDENS, and TARGETS [heads, 2,
// SPLIT] as tiles; phi'(z_1) and u_2 W2^T phi''(z_1) as fragments.

struct State {
    Fragment w1, w2, s1, s2;
};
__device__ __forceinline__ void load_state(State& x, const float* base, int s) {
    x.w1 = load_floats(base + s * TILE, HIDDEN);
    x.w2 = load_floats(base + SIZE + s * NUMBERS, TILE);
    if (MOMENTUM) {
        x.s1 = load_floats(base + 2 * SIZE + s * TILE, HIDDEN);
        x.s2 = load_floats(base + 3 * SIZE + s * NUMBERS, TILE);
    }
}
__device__ __forceinline__ void save_state(const State& x, float* base, int s) {
    store_floats(base + s * TILE, HIDDEN, x.w1);
    store_floats(base + SIZE + s * NUMBERS, TILE, x.w2);
    if (MOMENTUM) {
        store_floats(base + 2 * SIZE + s * TILE, HIDDEN, x.s1);
        store_floats(base + 3 * SIZE + s * NUMBERS, TILE, x.s2);
    }
}

// The tiles of one slice. u_1 by itself goes where nothing is read any more then.
static const int SLICE_TILES = 5 + (TARGET ? 2 : 0) + (MOMENTUM ? 3 : 0);
struct Slice {
    char *w1, *w2, *x, *xg, *ug, *m1, *m2, *xe, *s1, *s2;
    __device__ __forceinline__ char* plain() const { return MOMENTUM ? s1 : w1; }
    __device__ __forceinline__ char* ue() const { return s2; }
};
__device__ __forceinline__ Slice slice_at(char* tiles) {
    Slice o;
    o.w1 = tiles, o.w2 = o.w1 + TILE_BYTES, o.x = o.w2 + TILE_BYTES, o.xg = o.x + TILE_BYTES,
    o.ug = o.xg + TILE_BYTES;
    o.m1 = o.ug + TILE_BYTES, o.m2 = o.m1 + TILE_BYTES;
    o.xe = o.ug + (TARGET ? 3 : 1) * TILE_BYTES, o.s1 = o.xe + TILE_BYTES, o.s2 = o.s1 + TILE_BYTES;
    return o;
}

extern "C" __global__ void __cluster_dims__(PROGRAMS, 1, 1) __launch_bounds__(THREADS, 1)
    write_kernel(const bf16* K, const bf16* V, const float* ENDS, const float* LAST, float* CHECKPOINTS,
                 bf16* STATES, bf16* STEPS, bf16* HIDDENS, bf16* ZH, float* NORMS, const bf16* TARGETS,
                 const float* GAMMA, const float* BETA, const float* START, const unsigned char* RESETS,
                 const int* OPEN, float* ANCHOR, long kb, long kt, long kh, long vb, long vt, long vh,
                 int walks, int heads, int chunks, int tokens, int first_chunk, int span, int interval,
                 int rows, int first_walk, float eps, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    int rank = blockIdx.x % PROGRAMS, walk = blockIdx.x / PROGRAMS;
    int m = first_walk + walk % walks, piece = walk / walks;
    int b = m / heads, h = m % heads;
    char *k_tile = shared, *u2_tile = k_tile + TILE_BYTES;
    Slice o[SLICES];
    EACH_SLICE o[i] = slice_at(shared + (2 + i * SLICE_TILES) * TILE_BYTES);
    float *inbox = (float*)(shared + (2 + SLICES * SLICE_TILES) * TILE_BYTES), *norm = inbox + NUMBERS;
    u64* barriers = (u64*)(norm + 2 * TILE);
    Exchange exchange(inbox, barriers);
    Arrival targets = {barriers + 2, 2 * SLICES * TILE_BYTES, 0};

    int begin = first_chunk + piece * rows, stop = min(min(begin + rows, first_chunk + span), chunks);
    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    // Of the rows whose sums this program owns.
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;

    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    State state[SLICES];
    EACH_SLICE load_state(state[i], CHECKPOINTS + ((long)(begin / interval) * walks + m) * PARTS * SIZE,
                          rank * SLICES + i);
    Pieces next = load_pieces(k_at + (long)begin * TILE * kt, kt, tokens - begin * TILE);
    if (TARGET && threadIdx.x == 0) prepare(targets);
    exchange.prepare_all();
    if (TARGET) {
        if (threadIdx.x == 0) {
            expect(targets);
            EACH_SLICE {
                const bf16* target = TARGETS + ((long)h * 2 * SPLIT + rank * SLICES + i) * NUMBERS;
                fetch(o[i].m1, target, targets);
                fetch(o[i].m2, target + SIZE, targets);
            }
        }
        await(targets);
    }

    for (int n = begin; n < stop; ++n) {
        EACH_SLICE {
            int s = rank * SLICES + i;
            if (HAS_RESETS && RESETS[b * chunks + n]) load_state(state[i], START + (long)h * PARTS * SIZE, s);
            if (SAVE && n % interval == 0)
                save_state(state[i], CHECKPOINTS + ((long)(n / interval) * walks + m) * PARTS * SIZE, s);
            if (HAS_OPEN && n == OPEN[b]) {
                float* anchor = ANCHOR + (long)m * 2 * SIZE;
                store_floats(anchor + s * TILE, HIDDEN, state[i].w1);
                store_floats(anchor + SIZE + s * NUMBERS, TILE, state[i].w2);
            }
            store_tile(o[i].w1, packed(state[i].w1));
            store_tile(o[i].w2, packed(state[i].w2));
            if (MOMENTUM) {
                store_tile(o[i].s1, packed(state[i].s1));
                store_tile(o[i].s2, packed(state[i].s2));
            }
        }
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        store_pieces(k_tile, next);
        tiles_ready();
        if (threadIdx.x == 0) {
            // What the next chunk waits for.
            if (n + 1 < stop) {
                bring(ENDS + (cell + 1) * 2 * TILE, 2 * TILE * 4);
                bring(LAST + (cell + 1) * 4, 16);
            }
            EACH_SLICE {
                bf16* out = STATES + (here * PARTS * SPLIT + rank * SLICES + i) * NUMBERS;
                send(out, o[i].w1);
                send(out + SIZE, o[i].w2);
                if (MOMENTUM) {
                    send(out + 2 * SIZE, o[i].s1);
                    send(out + 3 * SIZE, o[i].s2);
                }
            }
        }
        Fragment z[SLICES];
        EACH_SLICE {
            begin_product<false, false, false>(z[i], k_tile, o[i].w1, side);
            if (TARGET) begin_product<false, false, true>(z[i], k_tile, o[i].m1, side);
        }
        // What comes from memory is under way meanwhile.
        uint2 values[TURNS];
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int t = n * TILE + rank * ROWS + r * 16 + own;
            values[r] = make_uint2(0, 0);
            if (t < tokens) values[r] = *(const uint2*)(v_at + t * vt + column);
        }
        if (n + 1 < stop) next = load_pieces(k_at + (long)(n + 1) * TILE * kt, kt, tokens - (n + 1) * TILE);
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        end_products();

        Packed slope[SLICES], curvature[SLICES];
        EACH_SLICE {
            settle(z[i]);
            Fragment slopes, curvatures;
            FOR_EACH activate(z[i].f[j][r], z[i].f[j][r], slopes.f[j][r], curvatures.f[j][r]);
            Packed x = packed(z[i]);
            slope[i] = packed(slopes);
            if (!SAVE) curvature[i] = packed(curvatures);
            store_tile(o[i].x, x);
            store_tile(o[i].xg, packed(rows_scaled(x, g_end)));
            if (MOMENTUM) store_tile(o[i].xe, packed(rows_scaled(x, e_end)));
        }
        tiles_ready();
        Fragment part;
        EACH_SLICE {
            if (i == 0)
                begin_product<false, false, false>(part, o[i].x, o[i].w2, side);
            else
                begin_product<false, false, true>(part, o[i].x, o[i].w2, side);
            if (TARGET) begin_product<false, false, true>(part, o[i].x, o[i].m2, side);
        }
        long kind = (long)walks * span * SIZE;
        bf16* hidden = HIDDENS + (here * SPLIT + rank * SLICES) * NUMBERS;
        EACH_SLICE {
            if (!SAVE && threadIdx.x == 0) send(hidden + i * NUMBERS, o[i].x);
            if (!SAVE) store_fragment(hidden + kind + i * NUMBERS, slope[i]);
        }
        end_products();
        settle(part);
        exchange.send_part(rank, part);
        if (threadIdx.x == 0) sent();
        exchange.await_parts();

#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int row = r * 16 + own, t = rank * ROWS + row;
            float4 gamma = all_of(1.f), beta = all_of(0.f), v = four(values[r]),
                   k = load_four(k_tile, t, column);
            if (NORM == 2)
                gamma = *(const float4*)(norm + column), beta = *(const float4*)(norm + TILE + column);
            float inverse;
            float4 zh = standardise(exchange.sum_of_row(row, column), eps, inverse);
            float4 e = loss_error(head(k, zh, gamma, beta), v, scale, threshold) * gamma;
            float along = row_sum(e * zh);
            uint2 u = pack_four(through_norm(e, zh, inverse), -1.f);
            exchange.send_made(u2_tile, t, column, u);
            *(uint2*)((char*)(STEPS + here * NUMBERS) + tile_byte(t, column)) = u;
            if (!SAVE) {
                *(uint2*)(ZH + here * NUMBERS + t * TILE + column) = pack_four(zh);
                if (column == 0) {
                    NORMS[here * 2 * TILE + t] = inverse;
                    NORMS[here * 2 * TILE + TILE + t] = along;
                }
            }
        }
        exchange.await_made();

        EACH_SLICE {
            begin_product<false, true, false>(z[i], u2_tile, o[i].w2, side);
            if (TARGET) begin_product<false, true, true>(z[i], u2_tile, o[i].m2, side);
        }
        end_products();
        EACH_SLICE {
            settle(z[i]);
            if (!SAVE) store_fragment(hidden + 3 * kind + i * NUMBERS, packed(times(z[i], curvature[i])));
            Packed u = packed(times(z[i], slope[i]));
            store_tile(o[i].ug, packed(rows_scaled(u, g_end)));
            if (MOMENTUM) store_tile(o[i].ue(), packed(rows_scaled(u, e_end)));
            if (!SAVE) store_tile(o[i].plain(), u);
        }
        tiles_ready();
        EACH_SLICE {
            if (!SAVE && threadIdx.x == 0) send(hidden + 2 * kind + i * NUMBERS, o[i].plain());
        }
        EACH_SLICE {
            State& x = state[i];
            if (MOMENTUM) {
                combine(x.w1, A, F, x.s1);
                combine(x.w2, A, F, x.s2);
                multiply(x.s1, decay);
                multiply(x.s2, decay);
                begin_product<true, false, true>(x.s1, k_tile, o[i].ue(), side);
                begin_product<true, false, true>(x.s2, o[i].xe, u2_tile, side);
            } else {
                multiply(x.w1, A);
                multiply(x.w2, A);
            }
            begin_product<true, false, true>(x.w1, k_tile, o[i].ug, side);
            begin_product<true, false, true>(x.w2, o[i].xg, u2_tile, side);
        }
        if (threadIdx.x == 0) sent();
        end_products();
        EACH_SLICE {
            settle(state[i].w1), settle(state[i].w2);
            if (MOMENTUM) settle(state[i].s1), settle(state[i].s2);
        }
        __syncthreads();
    }
    EACH_SLICE {
        if (SAVE)
            save_state(state[i],
                       CHECKPOINTS + ((long)((stop + interval - 1) / interval) * walks + m) * PARTS * SIZE,
                       rank * SLICES + i);
    }
}
