// The gradient of the writes, last chunk first: `write_backward_kernel` of ../write.py for heads and chunks of 64 in
// bfloat16. Programs, sums over them and order in memory as in write.cu; AFTER and G_Z1 as tiles; G_STATES, G_U1 and
// G_X2, what the reads of each chunk add, as fragments.

// g (a B) + e (a C), rows scaled by g and e.
template <bool TB>
__device__ __forceinline__ Fragment through_steps(const char* a, const char* b, const char* c, const float (&g)[2],
                                                  const float (&e)[2], int side) {
    Fragment x, y;
    begin_product<false, TB, false>(x, a, b, side);
    if (MOMENTUM) begin_product<false, TB, false>(y, a, c, side);
    end_products();
    settle(x);
    scale_rows(x, g);
    if (MOMENTUM) {
        settle(y);
        scale_rows(y, e);
        add(x, y);
    }
    return x;
}
__device__ __forceinline__ void add_floats(float* base, int stride, const Fragment& x) {
    Fragment y = load_floats(base, stride);
    add(y, x);
    store_floats(base, stride, y);
}

// The tiles of one slice.
static const int SLICE_TILES = 5 + (TARGET ? 1 : 0) + (MOMENTUM ? 2 : 0);
struct Slice {
    char *x, *w, *dw1, *dw2, *pulled, *m, *ds1, *ds2;
};
__device__ __forceinline__ Slice slice_at(char* tiles) {
    Slice o;
    o.x = tiles, o.w = o.x + TILE_BYTES, o.dw1 = o.w + TILE_BYTES, o.dw2 = o.dw1 + TILE_BYTES;
    o.pulled = o.dw2 + TILE_BYTES, o.m = o.pulled + TILE_BYTES;
    o.ds1 = o.pulled + (TARGET ? 2 : 1) * TILE_BYTES, o.ds2 = o.ds1 + TILE_BYTES;
    return o;
}
// Loads before are not begun together with those after, which would cost registers.
__device__ __forceinline__ void in_turn() {
    if (SLICES == 2) asm volatile("" ::: "memory");
}
// Gradients of the state. With two slices the registers are too few for all: that of S2 lies in shared memory.
static const bool APART = MOMENTUM && SLICES == 2;
struct State {
    Fragment w1, w2, s1, own_s2;
    float* place;
    __device__ __forceinline__ Fragment s2() const {
        if (!APART) return own_s2;
        Fragment x;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float4 v = ((const float4*)place)[j * THREADS + threadIdx.x];
            x.f[j][0] = v.x, x.f[j][1] = v.y, x.f[j][2] = v.z, x.f[j][3] = v.w;
        }
        return x;
    }
    __device__ __forceinline__ void set_s2(const Fragment& x) {
        if (!APART) own_s2 = x;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (APART) ((float4*)place)[j * THREADS + threadIdx.x] = make_float4(x.f[j][0], x.f[j][1], x.f[j][2], x.f[j][3]);
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) write_backward_kernel(
    const bf16* K, const bf16* V, const float* ENDS, const float* LAST, const bf16* STATES, const bf16* STEPS,
    const bf16* HIDDENS, const bf16* ZH, const float* NORMS, const bf16* TARGETS, const float* GAMMA,
    const float* BETA, const unsigned char* RESETS, const int* OPEN, const bf16* G_STATES, const bf16* G_U1,
    const bf16* G_X2, const bf16* G_U2, float* CARRIED, bf16* AFTER, bf16* G_Z1, float* G_STEPS,
    const float* G_ANCHOR, float* G_START, uint4* MEETING, long kb, long kt, long kh, long vb, long vt, long vh, int walks,
    int heads, int chunks, int tokens, int first_chunk, int span, float scale, float threshold) {
    extern __shared__ __align__(1024) char shared[];
    const int side = side_of_warp();
    int program = program_number(MEETING, shared), rank = program % PROGRAMS, m = program / PROGRAMS;
    int b = m / heads, h = m % heads;
    char *k_tile = shared, *u_tile = k_tile + TILE_BYTES, *z2_tile = u_tile + TILE_BYTES;
    Slice o[SLICES];
    EACH_SLICE o[i] = slice_at(shared + (3 + i * SLICE_TILES) * TILE_BYTES);
    float *inbox = (float*)(shared + (3 + SLICES * SLICE_TILES) * TILE_BYTES), *places = inbox + NUMBERS, *norm = places + (APART ? SLICES * NUMBERS : 0);
    u64* barriers = (u64*)(norm + 2 * TILE);
    Exchange exchange(inbox, barriers, MEETING, m);
    Arrival operands = {barriers + 2, (1 + 2 * SLICES) * TILE_BYTES, 0};
    Arrival targets = {barriers + 3, SLICES * TILE_BYTES, 0};

    const bf16 *k_at = K + b * kb + h * kh, *v_at = V + b * vb + h * vh;
    float* carried = CARRIED + (long)m * PARTS * SIZE;
    long kind = (long)walks * span * SIZE;
    int own = threadIdx.x >> 4, column = (threadIdx.x & 15) * 4;
    if (NORM == 2 && threadIdx.x < TILE) {
        norm[threadIdx.x] = GAMMA[h * TILE + threadIdx.x];
        norm[TILE + threadIdx.x] = BETA[h * TILE + threadIdx.x];
    }
    State d[SLICES];
    EACH_SLICE {
        int first = (rank * SLICES + i) * TILE, second = SIZE + (rank * SLICES + i) * NUMBERS;
        d[i].place = places + i * NUMBERS;
        d[i].w1 = load_floats(carried + first, HIDDEN);
        d[i].w2 = load_floats(carried + second, TILE);
        if (MOMENTUM) {
            d[i].s1 = load_floats(carried + 2 * SIZE + first, HIDDEN);
            d[i].set_s2(load_floats(carried + 2 * SIZE + second, TILE));
        }
    }
    int last = min(first_chunk + span, chunks) - 1;
    // What comes as tiles for chunk n, by thread 0.
    auto fetch_chunk = [&](int n) {
        long here = (long)m * span + n - first_chunk;
        expect(operands);
        EACH_SLICE {
            int s = rank * SLICES + i;
            fetch(o[i].x, HIDDENS + (here * SPLIT + s) * NUMBERS, operands);
            fetch(o[i].w, STATES + (here * PARTS * SPLIT + SPLIT + s) * NUMBERS, operands);
        }
        fetch(u_tile, STEPS + here * NUMBERS, operands);
    };
    // What chunk n needs besides, from memory to the cache.
    auto bring_chunk = [&](int n) {
        long here = (long)m * span + n - first_chunk, wide = (here * SPLIT + rank * SLICES) * NUMBERS;
        EACH_SLICE {
            long s = wide + i * NUMBERS;
            bring(HIDDENS + s);
            bring(HIDDENS + kind + s);
            bring(HIDDENS + 3 * kind + s);
            bring(STATES + (here * PARTS * SPLIT + SPLIT + rank * SLICES + i) * NUMBERS);
            for (int part = 0; part < PARTS; ++part)
                bring(G_STATES + (here * PARTS * SPLIT + rank * SLICES + i) * NUMBERS + part * SIZE);
            if (READS) {
                bring(G_U1 + s);
                bring(G_X2 + s);
            }
        }
        bring(STEPS + here * NUMBERS);
        if (READS) bring(G_U2 + here * NUMBERS);
    };
    Pieces keys = load_pieces(k_at + (long)last * TILE * kt, kt, tokens - last * TILE);
    if (threadIdx.x == 0) {
        prepare(operands);
        if (TARGET) prepare(targets);
    }
    exchange.prepare_all();
    if (threadIdx.x == 0) fetch_chunk(last);
    if (TARGET) {
        if (threadIdx.x == 0) {
            expect(targets);
            EACH_SLICE fetch(o[i].m, TARGETS + ((long)h * 2 * SPLIT + SPLIT + rank * SLICES + i) * NUMBERS, targets);
        }
        await(targets);
    }

    for (int n = last; n >= first_chunk; --n) {
        long cell = (long)m * chunks + n, here = (long)m * span + n - first_chunk;
        long wide = (here * SPLIT + rank * SLICES) * NUMBERS;
        const bf16* reads = G_STATES + (here * PARTS * SPLIT + rank * SLICES) * NUMBERS;
        Packed slope[SLICES], bend[SLICES], extra[SLICES];
        EACH_SLICE {
            slope[i] = load_fragment(HIDDENS + kind + wide + i * NUMBERS);
            bend[i] = load_fragment(HIDDENS + 3 * kind + wide + i * NUMBERS);
            if (READS) extra[i] = load_fragment(G_U1 + wide + i * NUMBERS);
        }
        const float* ends = ENDS + cell * 2 * TILE;
        float g_end[2] = {ends[own_row()], ends[own_row() + 8]}, e_end[2] = {0.f, 0.f};
        if (MOMENTUM) e_end[0] = ends[TILE + own_row()], e_end[1] = ends[TILE + own_row() + 8];
        float A = LAST[cell * 4], F = LAST[cell * 4 + 1], decay = LAST[cell * 4 + 2];
        store_pieces(k_tile, keys);
        EACH_SLICE {
            store_tile(o[i].dw1, packed(d[i].w1));
            store_tile(o[i].dw2, packed(d[i].w2));
            if (MOMENTUM) {
                store_tile(o[i].ds1, packed(d[i].s1));
                store_tile(o[i].ds2, packed(d[i].s2()));
            }
        }
        await(operands);
        tiles_ready();
        if (threadIdx.x == 0) {
            EACH_SLICE {
                bf16* after = AFTER + (here * PARTS * SPLIT + rank * SLICES + i) * NUMBERS;
                send(after, o[i].dw1);
                send(after + SIZE, o[i].dw2);
                if (MOMENTUM) {
                    send(after + 2 * SIZE, o[i].ds1);
                    send(after + 3 * SIZE, o[i].ds2);
                }
            }
            if (n > first_chunk) bring_chunk(n - 1);
        }

        // The steps, as the state takes them and as the reads see them; u_1 = (u_2 W2^T) phi'(z_1).
        Packed g_z1[SLICES];
        EACH_SLICE {
            Fragment g = through_steps<false>(k_tile, o[i].dw1, o[i].ds1, g_end, e_end, side);
            if (READS) add(g, extra[i]);
            g_z1[i] = packed(times(g, bend[i]));
            store_tile(o[i].pulled, packed(times(g, slope[i])));
        }
        Fragment part;
        {
            Fragment y;
            EACH_SLICE {
                if (i == 0) {
                    begin_product<false, false, false>(part, o[i].x, o[i].dw2, side);
                    if (MOMENTUM) begin_product<false, false, false>(y, o[i].x, o[i].ds2, side);
                } else {
                    begin_product<false, false, true>(part, o[i].x, o[i].dw2, side);
                    if (MOMENTUM) begin_product<false, false, true>(y, o[i].x, o[i].ds2, side);
                }
            }
            end_products();
            settle(part);
            scale_rows(part, g_end);
            if (MOMENTUM) {
                settle(y);
                scale_rows(y, e_end);
                add(part, y);
            }
        }
        EACH_SLICE if (!APART && READS) extra[i] = load_fragment(G_X2 + wide + i * NUMBERS);
        if (APART && threadIdx.x == 0) sent();
        tiles_ready();
        // Nobody needs the tile of dS1 any more.
        EACH_SLICE if (APART) store_fragment((bf16*)o[i].ds1, g_z1[i]);
        EACH_SLICE {
            begin_product<false, false, true>(part, o[i].pulled, o[i].w, side);
            if (TARGET) begin_product<false, false, true>(part, o[i].pulled, o[i].m, side);
        }
        end_products();
        settle(part);
        exchange.send_part(rank, part);
        // While the parts travel: the gradient of x_2 from its steps, and what the state passes on.
        Fragment g[SLICES];
        EACH_SLICE {
            g[i] = through_steps<true>(u_tile, o[i].dw2, o[i].ds2, g_end, e_end, side);
            if (READS) add(g[i], APART ? load_fragment(G_X2 + wide + i * NUMBERS) : extra[i]);
            if (MOMENTUM) {
                combine(d[i].s1, decay, F, d[i].w1);
                if (READS) add(d[i].s1, load_fragment(reads + 2 * SIZE + i * NUMBERS));
                in_turn();
                Fragment s2 = d[i].s2();
                combine(s2, decay, F, d[i].w2);
                if (READS) add(s2, load_fragment(reads + 3 * SIZE + i * NUMBERS));
                d[i].set_s2(s2);
                in_turn();
            }
            multiply(d[i].w1, A);
            multiply(d[i].w2, A);
            add(d[i].w1, load_fragment(reads + i * NUMBERS));
            add(d[i].w2, load_fragment(reads + SIZE + i * NUMBERS));
            begin_product<true, false, true>(d[i].w2, o[i].pulled, u_tile, side);
        }
        end_products();
        EACH_SLICE settle(d[i].w2);
        if (threadIdx.x == 0) sent();
        exchange.await_parts();

        // u_2 from z_2, in the rows that this program owns.
#pragma unroll
        for (int r = 0; r < TURNS; ++r) {
            int row = r * 16 + own, t = rank * ROWS + row;
            long narrow = here * NUMBERS + t * TILE + column;
            float4 g_u = exchange.sum_of_row(rank, row, column);
            if (READS) g_u = g_u + four(*(const uint2*)(G_U2 + narrow));
            *(float4*)(G_STEPS + narrow) = g_u;
            float4 zh = four(*(const uint2*)(ZH + narrow)), gamma = all_of(1.f), beta = all_of(0.f);
            float inverse = 1.f;
            if (NORM == 2) {
                inverse = NORMS[here * 2 * TILE + t];
                gamma = *(const float4*)(norm + column), beta = *(const float4*)(norm + TILE + column);
            }
            float4 weighted = through_norm(g_u * -1.f, zh, inverse), f = zh, v = zh;
            if (LOSS == 2) {
                v = all_of(0.f);
                if (n * TILE + t < tokens) v = four(*(const uint2*)(v_at + (long)(n * TILE + t) * vt + column));
                f = head(load_four(k_tile, t, column), zh, gamma, beta);
            }
            float4 g_z = output_gradient(weighted * gamma, f, v, scale, threshold);
            if (NORM == 2) {
                float along = NORMS[here * 2 * TILE + TILE + t], share = inverse * (1.f / TILE);
                float4 u = load_four(u_tile, t, column);
                float4 by = zh * row_sum(g_u * u) + weighted * along + u * row_sum(g_u * zh);
                g_z = through_norm(g_z * gamma, zh, inverse) - by * share;
            }
            exchange.send_made(z2_tile, t, column, pack_four(g_z));
        }
        // Again, for it is not worth its registers in between.
        EACH_SLICE slope[i] = load_fragment(HIDDENS + kind + wide + i * NUMBERS);
        exchange.await_made(rank, z2_tile);

        EACH_SLICE {
            begin_product<false, true, true>(g[i], z2_tile, o[i].w, side);
            if (TARGET) begin_product<false, true, true>(g[i], z2_tile, o[i].m, side);
            begin_product<true, false, true>(d[i].w2, o[i].x, z2_tile, side);
        }
        if (n > first_chunk) keys = load_pieces(k_at + (long)(n - 1) * TILE * kt, kt, TILE);
        end_products();
        EACH_SLICE {
            settle(g[i]), settle(d[i].w2);
            if (APART) g_z1[i] = load_fragment((const bf16*)o[i].ds1);
            FOR_EACH g[i].f[j][r] = at(g_z1[i], j, r) + g[i].f[j][r] * at(slope[i], j, r);
            store_tile(o[i].dw1, packed(g[i]));
        }
        tiles_ready();
        if (threadIdx.x == 0) {
            EACH_SLICE send(G_Z1 + wide + i * NUMBERS, o[i].dw1);
            // All have read what comes as tiles.
            if (n > first_chunk) fetch_chunk(n - 1);
        }
        EACH_SLICE begin_product<true, false, true>(d[i].w1, k_tile, o[i].dw1, side);
        if (threadIdx.x == 0) sent();
        end_products();
        EACH_SLICE {
            settle(d[i].w1);
            int first = (rank * SLICES + i) * TILE, second = SIZE + (rank * SLICES + i) * NUMBERS;
            if (HAS_OPEN && n == OPEN[b]) {
                const float* anchor = G_ANCHOR + (long)m * 2 * SIZE;
                add(d[i].w1, load_floats(anchor + first, HIDDEN));
                add(d[i].w2, load_floats(anchor + second, TILE));
            }
            if (HAS_RESETS && RESETS[b * chunks + n]) {
                float* start = G_START + (long)m * PARTS * SIZE;
                add_floats(start + first, HIDDEN, d[i].w1);
                add_floats(start + second, TILE, d[i].w2);
                clear(d[i].w1);
                clear(d[i].w2);
                if (MOMENTUM) {
                    add_floats(start + 2 * SIZE + first, HIDDEN, d[i].s1);
                    add_floats(start + 2 * SIZE + second, TILE, d[i].s2());
                    clear(d[i].s1);
                    d[i].set_s2(d[i].s1);
                }
            }
        }
        __syncthreads();
    }
    EACH_SLICE {
        int first = (rank * SLICES + i) * TILE, second = SIZE + (rank * SLICES + i) * NUMBERS;
        store_floats(carried + first, HIDDEN, d[i].w1);
        store_floats(carried + second, TILE, d[i].w2);
        if (MOMENTUM) {
            store_floats(carried + 2 * SIZE + first, HIDDEN, d[i].s1);
            store_floats(carried + 2 * SIZE + second, TILE, d[i].s2());
        }
    }
}
