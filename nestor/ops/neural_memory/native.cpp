// The walk over the chunks of a neural memory on a CPU, for the choices that native.py names.
//
// The equations and their names are those of chunked.py. One thread takes one sequence and head through all
// its chunks, so that the weights stay in the core's cache; products have tiles of 6 rows and two vectors.
// Rows are tokens, all matrices are row-major, C tokens are a chunk, and c counts components (D, or D and S).

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int MAX_DEPTH = 4;
constexpr int TILE_ROWS = 6;
enum Activation { GELU, SILU };
enum Norm { NONE, RESIDUAL, RESIDUAL_LAYERNORM };
enum Loss { L2, DOT_PRODUCT };

}  // namespace

// Mirrored field by field in native.py. Pointers are null where a choice has no such tensor.
struct Problem {
    int64_t sequences, chunks, tokens, depth, threads, activation, norm, loss, exclusive;
    int64_t widths[MAX_DEPTH + 1];
    double norm_eps, loss_scale;
    const uint8_t *resets, *closes;                                          // [chunks, sequences]
    const uint8_t* valid;                                                    // [sequences, chunks, C]
    const void *q, *k, *v, *theta, *eta, *alpha;                             // [sequences, chunks, C, ...]
    const void *gamma, *beta;                                                // [sequences, p]
    const void *start[MAX_DEPTH], *stacks[MAX_DEPTH];                        // [sequences, c, in, out]
    const void *anchor[MAX_DEPTH], *targets[MAX_DEPTH];                      // [sequences, in, out]
    void *states, *tape;                                                     // see `states_size`, `tape_size`
    void *y, *surprise, *final_stacks[MAX_DEPTH], *final_anchor[MAX_DEPTH];  // results of the forward
    const void *g_y, *g_final_stacks[MAX_DEPTH], *g_final_anchor[MAX_DEPTH];  // inputs of the backward
    void *g_q, *g_k, *g_v, *g_theta, *g_eta, *g_alpha;                        // results of the backward
    void *g_gamma, *g_beta, *g_start[MAX_DEPTH], *g_stacks[MAX_DEPTH], *g_anchor[MAX_DEPTH],
        *g_targets[MAX_DEPTH];
};

namespace {

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
};

// Element (i, j) lies at data[i * row + j * column].
template <class T>
struct View {
    const T* data;
    int64_t row, column;
};

template <class T>
View<T> rows_of(const T* data, int64_t width) {
    return {data, width, 1};
}

template <class T>
View<T> transposed(const T* data, int64_t width) {
    return {data, 1, width};
}

// One factor per row or per summand, or none.
template <class T>
struct Factors {
    const T* data = nullptr;
    int64_t stride = 1;
    T operator[](int64_t i) const { return data ? data[i * stride] : T(1); }
};

template <class T, int R>
void tile(View<T> a, const T* b, int64_t depth, T* result, int64_t stride, int64_t columns,
          Factors<T> row_factors, bool add) {
    using V = typename Vector<T>::type;
    constexpr int64_t lanes = Vector<T>::lanes;
    V sum[R][2] = {};
    const T* column = a.data;
    for (int64_t k = 0; k < depth; k++, b += 2 * lanes, column += a.column) {
        const V low = *reinterpret_cast<const V*>(b), high = *reinterpret_cast<const V*>(b + lanes);
        for (int r = 0; r < R; r++) {
            sum[r][0] += column[r * a.row] * low;
            sum[r][1] += column[r * a.row] * high;
        }
    }
    for (int r = 0; r < R; r++, result += stride) {
        if (row_factors.data)
            for (auto& s : sum[r]) s *= row_factors[r];
        if (columns == 2 * lanes) {
            V* first = reinterpret_cast<V*>(result);
            V* second = reinterpret_cast<V*>(result + lanes);
            *first = add ? *first + sum[r][0] : sum[r][0];
            *second = add ? *second + sum[r][1] : sum[r][1];
        } else {
            T values[2 * lanes];
            std::memcpy(values, sum[r], sizeof(values));
            for (int64_t j = 0; j < columns; j++) result[j] = add ? result[j] + values[j] : values[j];
        }
    }
}

// What a product need not compute: its own upper triangle, or summands in the triangle where a is zero.
enum Triangle { FULL, RESULT_LOWER, LEFT_LOWER, LEFT_UPPER };

template <class T>
class Products {
   public:
    // Room for products of at most `depth` summands.
    explicit Products(int64_t depth) : panel_(depth * 2 * Vector<T>::lanes) {}

    // result = diag(row_factors) a diag(depth_factors) b, or += that; it is row-major and N wide.
    void operator()(int64_t M, int64_t N, int64_t K, View<T> a, View<T> b, T* result, bool add,
                    Factors<T> row_factors = {}, Factors<T> depth_factors = {}, Triangle triangle = FULL) {
        static constexpr decltype(&tile<T, 1>) tiles[] = {tile<T, 1>, tile<T, 2>, tile<T, 3>,
                                                          tile<T, 4>, tile<T, 5>, tile<T, TILE_ROWS>};
        constexpr int64_t wide = 2 * Vector<T>::lanes;
        for (int64_t j = 0; j < N; j += wide) {
            const int64_t columns = std::min(wide, N - j);
            pack(b, K, j, columns, depth_factors);
            for (int64_t i = 0; i < M; i += TILE_ROWS) {
                if (triangle == RESULT_LOWER && i + TILE_ROWS <= j) continue;
                const int64_t from = triangle == LEFT_UPPER ? std::min(i, K) : 0;
                const int64_t depth = (triangle == LEFT_LOWER ? std::min(i + TILE_ROWS, K) : K) - from;
                const View<T> left = {a.data + i * a.row + from * a.column, a.row, a.column};
                const T* panel = panel_.data() + from * wide;
                const Factors<T> factors = {
                    row_factors.data ? row_factors.data + i * row_factors.stride : nullptr,
                    row_factors.stride};
                T* out = result + i * N + j;
                tiles[std::min<int64_t>(TILE_ROWS, M - i) - 1](left, panel, depth, out, N, columns, factors,
                                                               add);
            }
        }
    }

   private:
    std::vector<T> panel_;

    void pack(View<T> b, int64_t K, int64_t first, int64_t columns, Factors<T> factors) {
        constexpr int64_t wide = 2 * Vector<T>::lanes;
        T* panel = panel_.data();
        const T* source = b.data + first * b.column;
        if (columns < wide) std::memset(panel, 0, sizeof(T) * K * wide);
        if (b.column == 1) {
            for (int64_t k = 0; k < K; k++) {
                const T factor = factors[k];
                for (int64_t j = 0; j < columns; j++) panel[k * wide + j] = source[k * b.row + j] * factor;
            }
        } else {
            for (int64_t j = 0; j < columns; j++)
                for (int64_t k = 0; k < K; k++) panel[k * wide + j] = source[j * b.column + k * b.row];
            if (factors.data)
                for (int64_t k = 0; k < K; k++)
                    for (int64_t j = 0; j < columns; j++) panel[k * wide + j] *= factors[k];
        }
    }
};

// e^x by x = n ln 2 + r and a Taylor polynomial in r; written so that compilers vectorise it. NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.0f / 5040;
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline double exponential(double x) {
    x = x < -708.0 ? -708.0 : (x > 709.0 ? 709.0 : x);
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    for (double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                     1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        p = p * r + c;
    uint64_t bits;
    std::memcpy(&bits, &shifted, 8);
    bits = (bits - 0x4338000000000000u + 1023u) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return p * power;
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// phi(z), phi'(z) and, where wanted, phi''(z).
template <class T>
void activate(int64_t activation, const T* z, int64_t n, T* value, T* slope, T* curvature) {
    if (activation == GELU) {
        for (int64_t i = 0; i < n; i++) {
            const T cdf = T(0.5) * (T(1) + std::erf(z[i] * T(0.70710678118654752)));
            const T density = T(0.39894228040143268) * exponential(T(-0.5) * z[i] * z[i]);
            value[i] = z[i] * cdf;
            slope[i] = cdf + z[i] * density;
            if (curvature) curvature[i] = density * (T(2) - z[i] * z[i]);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const T s = T(1) / (T(1) + exponential(-z[i]));
        const T v = z[i] * s, d = s + v * (T(1) - s);
        value[i] = v;
        slope[i] = d;
        if (curvature) curvature[i] = (T(1) - s) * (T(2) * d - v);
    }
}

template <class T>
T mean_of(const T* a, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i];
    return sum / n;
}

// The output of a layer norm at one token, and its derivative w -> P w / s.
template <class T>
struct Normalised {
    std::vector<T> zh;
    T inverse_std = 1;

    explicit Normalised(int64_t p) : zh(p) {}

    void of(const T* z, int64_t p, double eps) {
        const T mean = mean_of(z, p);
        T variance = 0;
#pragma omp simd reduction(+ : variance)
        for (int64_t i = 0; i < p; i++) variance += (z[i] - mean) * (z[i] - mean);
        inverse_std = T(1) / std::sqrt(variance / p + T(eps));
        for (int64_t i = 0; i < p; i++) zh[i] = (z[i] - mean) * inverse_std;
    }

    void through(const T* w, int64_t p, T* out) const {
        const T mean = mean_of(w, p), along = dot(w, zh.data(), p) / p;
        for (int64_t i = 0; i < p; i++) out[i] = inverse_std * (w[i] - mean - zh[i] * along);
    }
};

// One sequence and head of a problem.
template <class T>
class Walk {
   public:
    Walk(const Problem& problem, bool backward)
        : P(problem),
          C(P.tokens),
          L(P.depth),
          momentum(P.eta),
          c(momentum ? 2 : 1),
          p(P.widths[0]),
          widest(*std::max_element(P.widths, P.widths + L + 1)),
          product(std::max(C, widest)),
          normalised(p) {
        for (int64_t l = 0; l < L; l++) {
            in[l] = P.widths[l], out[l] = P.widths[l + 1], size[l] = in[l] * out[l];
            place[l] = weights;
            weights += size[l];
            for (auto* rows : {&x[l], &xq[l], &slope[l], &curvature[l], &slope_q[l]}) rows->resize(C * in[l]);
            if (!backward) continue;
            g_steps[l].resize(C * out[l]), g_x[l].resize(C * in[l]), g_z[l].resize(C * out[l]);
        }
        state.resize(c * weights), anchor.resize(weights), tape_here.resize(P.tape ? 0 : tape_size(P));
        scores.resize(C * C), weighted.resize(C * C);
        G.resize((C + 1) * C), E.resize((C + 1) * C), A.resize(C + 1), F.resize(C + 1), M.resize(C + 1);
        keep.resize(C), hold.resize(C), write.resize(C * c), read_of.resize(C * c);
        for (auto* rows : {&rows_a, &rows_b, &rows_c}) rows->resize(C * widest);
        for (auto& v : vectors) v.resize(p);
        if (!backward) return;
        g_state.resize(c * weights), g_anchor.resize(weights), g_targets.resize(weights);
        g_scores.resize(C * C), g_gamma.resize(p), g_beta.resize(p);
        g_G.resize(C * C), g_read.resize(C * c), g_write.resize(C * c), back_G.resize(C), back_E.resize(C);
    }

    // What the backward needs of one sequence and chunk: the state before it, and the rows of `Tape`.
    static int64_t states_size(const Problem& P) {
        int64_t sum = 0;
        for (int64_t l = 0; l < P.depth; l++) sum += (P.eta ? 2 : 1) * P.widths[l] * P.widths[l + 1];
        return sum;
    }
    static int64_t tape_size(const Problem& P) {
        int64_t sum = 0;
        for (int64_t l = 0; l < P.depth; l++) sum += (l + 1 < P.depth ? 4 : 3) * P.widths[l + 1];
        return sum * P.tokens;
    }

    void forward(int64_t m) {
        sequence = m;
        for (int64_t l = 0; l < L; l++) {
            std::memcpy(component(state, l, 0), of(P.stacks[l], c * size[l]), sizeof(T) * c * size[l]);
            std::memcpy(anchor.data() + place[l], of(P.anchor[l], size[l]), sizeof(T) * size[l]);
        }
        for (int64_t n = 0; n < P.chunks; n++) {
            if (flag(P.resets, n)) {
                for (int64_t l = 0; l < L; l++)
                    std::memcpy(component(state, l, 0), of(P.start[l], c * size[l]), sizeof(T) * c * size[l]);
                weights_of(state.data());
            }
            if (P.states) std::memcpy(saved_state(n), state.data(), sizeof(T) * c * weights);
            const Tape tape = tape_of(n);
            chunk_forward(n, tape);
            T* y = chunk(P.y, n, C * p);
            for (int64_t t = 0; t < C; t++)
                head(chunk(P.q, n, C * p) + t * p, tape.zq[L - 1] + t * p, y + t * p);
            if (P.surprise) surprise(n, tape, chunk(P.surprise, n, C));
            update(n, tape);
            if (flag(P.closes, n)) weights_of(state.data());
        }
        for (int64_t l = 0; l < L; l++) {
            std::memcpy(of(P.final_stacks[l], c * size[l]), component(state, l, 0), sizeof(T) * c * size[l]);
            std::memcpy(of(P.final_anchor[l], size[l]), anchor.data() + place[l], sizeof(T) * size[l]);
        }
    }

    void backward(int64_t m) {
        sequence = m;
        for (auto* sums : {&g_targets, &g_gamma, &g_beta}) std::fill(sums->begin(), sums->end(), T(0));
        for (int64_t l = 0; l < L; l++) {
            std::memcpy(component(g_state, l, 0), of(P.g_final_stacks[l], c * size[l]),
                        sizeof(T) * c * size[l]);
            std::memcpy(g_anchor.data() + place[l], of(P.g_final_anchor[l], size[l]), sizeof(T) * size[l]);
            std::memset(of(P.g_start[l], c * size[l]), 0, sizeof(T) * c * size[l]);
        }
        if (flag(P.closes, P.chunks - 1)) anchor_to_state();
        for (int64_t n = P.chunks - 1; n >= 0; n--) {
            const bool reset = flag(P.resets, n), opens = reset || (n > 0 && flag(P.closes, n - 1));
            load(n);
            const Tape tape = tape_of(n);
            if (P.tape) {
                coefficients(n);
                recall(tape);
            } else {
                chunk_forward(n, tape);
            }
            update_backward(n, tape);
            read_backward(n, tape);
            write_backward(n, tape);
            coefficients_backward(n);
            if (opens) anchor_to_state();
            if (reset) {
                for (int64_t l = 0; l < L; l++) {
                    T* to = of(P.g_start[l], c * size[l]);
                    const T* from = component(g_state, l, 0);
                    for (int64_t i = 0; i < c * size[l]; i++) to[i] += from[i];
                }
                std::fill(g_state.begin(), g_state.end(), T(0));
            }
        }
        for (int64_t l = 0; l < L; l++) {
            std::memcpy(of(P.g_stacks[l], c * size[l]), component(g_state, l, 0), sizeof(T) * c * size[l]);
            std::memcpy(of(P.g_anchor[l], size[l]), g_anchor.data() + place[l], sizeof(T) * size[l]);
            if (P.targets[0])
                std::memcpy(of(P.g_targets[l], size[l]), g_targets.data() + place[l], sizeof(T) * size[l]);
        }
        if (P.norm == RESIDUAL_LAYERNORM) {
            std::memcpy(of(P.g_gamma, p), g_gamma.data(), sizeof(T) * p);
            std::memcpy(of(P.g_beta, p), g_beta.data(), sizeof(T) * p);
        }
    }

   private:
    // Per layer, [C, width]: z_l, u_l and, below the last layer, u_{l+1} W^T of keys; z~_l of queries.
    struct Tape {
        T *z[MAX_DEPTH], *steps[MAX_DEPTH], *zq[MAX_DEPTH], *pulled[MAX_DEPTH];
    };

    const Problem& P;
    const int64_t C, L;
    const bool momentum;
    const int64_t c, p, widest;
    int64_t in[MAX_DEPTH], out[MAX_DEPTH], size[MAX_DEPTH], place[MAX_DEPTH], weights = 0, sequence = 0;
    Products<T> product;
    Normalised<T> normalised;
    std::vector<T> x[MAX_DEPTH], xq[MAX_DEPTH];  // x_l and x~_l, l > 0; the inputs themselves are not copied
    std::vector<T> slope[MAX_DEPTH], curvature[MAX_DEPTH], slope_q[MAX_DEPTH];  // at x_l, l > 0
    std::vector<T> g_steps[MAX_DEPTH], g_x[MAX_DEPTH], g_z[MAX_DEPTH];
    std::vector<T> state, anchor, tape_here, scores, weighted, g_scores, rows_a, rows_b, rows_c, vectors[6];
    std::vector<T> g_state, g_anchor, g_targets, g_gamma, g_beta;
    // Row t + 1 of G, E, A, F, M (= m) belongs to token t, row 0 to the start of the chunk. keep = 1 - alpha
    // and hold = eta, both 1 where there is no token. write, read_of [C, c]: of D, of S.
    std::vector<T> G, E, A, F, M, keep, hold, write, read_of;
    std::vector<T> g_G, g_read, g_write, back_G, back_E;
    T g_carry[2], g_cross;

    // --- where things lie ---

    const T* of(const void* data, int64_t n) const { return static_cast<const T*>(data) + sequence * n; }
    T* of(void* data, int64_t n) const { return static_cast<T*>(data) + sequence * n; }
    T* chunk(void* data, int64_t n, int64_t each) const {
        return static_cast<T*>(data) + (sequence * P.chunks + n) * each;
    }
    const T* chunk(const void* data, int64_t n, int64_t each) const {
        return static_cast<const T*>(data) + (sequence * P.chunks + n) * each;
    }
    bool flag(const uint8_t* flags, int64_t n) const { return flags[n * P.sequences + sequence]; }
    T* saved_state(int64_t n) const { return chunk(P.states, n, c * weights); }
    // Component j of a layer; the components of a layer are neighbours.
    T* component(std::vector<T>& stacks, int64_t l, int64_t j) const {
        return stacks.data() + c * place[l] + j * size[l];
    }
    const T* target(int64_t l) const { return P.targets[0] ? of(P.targets[l], size[l]) : nullptr; }
    const T* keys(int64_t n, int64_t l) const { return l ? x[l].data() : chunk(P.k, n, C * p); }
    const T* queries(int64_t n, int64_t l) const { return l ? xq[l].data() : chunk(P.q, n, C * p); }
    Factors<T> factors(const std::vector<T>& data, int64_t j) const { return {data.data() + j, c}; }
    bool present(int64_t n, int64_t t) const {
        return !P.valid || P.valid[(sequence * P.chunks + n) * C + t];
    }
    // Row t of what a read by token t sees.
    int64_t seen(int64_t t) const { return P.exclusive ? t : t + 1; }

    Tape tape_of(int64_t n) {
        T* next = P.tape ? chunk(P.tape, n, tape_size(P)) : tape_here.data();
        Tape tape = {};
        auto take = [&](int64_t width) { return std::exchange(next, next + C * width); };
        for (int64_t l = 0; l < L; l++) {
            tape.z[l] = take(out[l]), tape.steps[l] = take(out[l]), tape.zq[l] = take(out[l]);
            if (l + 1 < L) tape.pulled[l] = take(out[l]);
        }
        return tape;
    }

    // The anchor becomes W of the given components: D, and M where there is one.
    void weights_of(const T* stacks) {
        for (int64_t l = 0; l < L; l++) {
            const T *deviation = stacks + c * place[l], *to = target(l);
            T* w = anchor.data() + place[l];
            for (int64_t i = 0; i < size[l]; i++) w[i] = to ? deviation[i] + to[i] : deviation[i];
        }
    }

    // State and anchor before chunk n.
    void load(int64_t n) {
        std::memcpy(state.data(), saved_state(n), sizeof(T) * c * weights);
        int64_t opened = n;
        while (opened >= 0 && !flag(P.resets, opened) && !(opened > 0 && flag(P.closes, opened - 1)))
            opened--;
        if (opened >= 0) return weights_of(saved_state(opened));
        for (int64_t l = 0; l < L; l++)
            std::memcpy(anchor.data() + place[l], of(P.anchor[l], size[l]), sizeof(T) * size[l]);
    }

    // --- forward ---

    // The recurrences of coefficients.py, row by row.
    void coefficients(int64_t n) {
        const T *theta = chunk(P.theta, n, C), *eta = momentum ? chunk(P.eta, n, C) : nullptr;
        const T* alpha = P.alpha ? chunk(P.alpha, n, C) : nullptr;
        std::fill_n(G.begin(), C, T(0)), std::fill_n(E.begin(), C, T(0));
        A[0] = M[0] = 1, F[0] = 0;
        for (int64_t t = 0; t < C; t++) {
            const bool here = present(n, t);
            keep[t] = here && alpha ? 1 - alpha[t] : T(1);
            hold[t] = !here ? T(1) : momentum ? eta[t] : T(0);
            const T *before_G = &G[t * C], *before_E = &E[t * C];
            T *now_G = &G[(t + 1) * C], *now_E = &E[(t + 1) * C];
            for (int64_t j = 0; j < C; j++) now_E[j] = hold[t] * before_E[j];
            now_E[t] = here ? theta[t] : T(0);
            M[t + 1] = hold[t] * M[t];
            const T into = here ? T(1) : T(0);
            for (int64_t j = 0; j < C; j++) now_G[j] = keep[t] * before_G[j] + into * now_E[j];
            A[t + 1] = keep[t] * A[t];
            F[t + 1] = keep[t] * F[t] + into * M[t + 1];
        }
        for (int64_t t = 0; t < C; t++) {
            write[t * c] = G[C * C + t], read_of[t * c] = A[seen(t)];
            if (momentum) write[t * c + 1] = E[C * C + t], read_of[t * c + 1] = F[seen(t)];
        }
    }

    void chunk_forward(int64_t n, const Tape& tape) {
        coefficients(n);
        write_gradients(n, tape);
        read(n, tape);
    }

    void write_gradients(int64_t n, const Tape& tape) {
        for (int64_t l = 0; l < L; l++) {
            product(C, out[l], in[l], rows_of(keys(n, l), in[l]), rows_of(anchor.data() + place[l], out[l]),
                    tape.z[l], false);
            if (l + 1 < L)
                activate(P.activation, tape.z[l], C * out[l], x[l + 1].data(), slope[l + 1].data(),
                         curvature[l + 1].data());
        }
        for (int64_t t = 0; t < C; t++) {
            error(n, t, tape);
            T* step = tape.steps[L - 1] + t * p;
            delta(rows_a.data() + t * p, step);
            for (int64_t i = 0; i < p; i++) step[i] = -step[i];
        }
        for (int64_t l = L - 1; l > 0; l--) {
            T *back = tape.pulled[l - 1], *step = tape.steps[l - 1];
            product(C, in[l], out[l], rows_of(tape.steps[l], out[l]),
                    transposed(anchor.data() + place[l], out[l]), back, false);
            for (int64_t i = 0; i < C * in[l]; i++) step[i] = back[i] * slope[l][i];
        }
    }

    // f from the memory's input and the network's output at one token. Leaves the token in `normalised`.
    void head(const T* input, const T* z, T* f) {
        if (P.norm == RESIDUAL_LAYERNORM) {
            const T *gamma = of(P.gamma, p), *beta = of(P.beta, p);
            normalised.of(z, p, P.norm_eps);
            for (int64_t i = 0; i < p; i++) f[i] = input[i] + beta[i] + gamma[i] * normalised.zh[i];
        } else {
            for (int64_t i = 0; i < p; i++) f[i] = P.norm == RESIDUAL ? input[i] + z[i] : z[i];
        }
    }

    // e of token t to rows_a.
    void error(int64_t n, int64_t t, const Tape& tape) {
        const T *key = chunk(P.k, n, C * p) + t * p, *value = chunk(P.v, n, C * p) + t * p;
        T* e = rows_a.data() + t * p;
        head(key, tape.z[L - 1] + t * p, e);
        for (int64_t i = 0; i < p; i++) e[i] = T(P.loss_scale) * (P.loss == L2 ? e[i] - value[i] : -value[i]);
    }

    // d loss / d z from e, at the token in `normalised`.
    void delta(const T* e, T* result) {
        if (P.norm != RESIDUAL_LAYERNORM) {
            std::memcpy(result, e, sizeof(T) * p);
            return;
        }
        const T* gamma = of(P.gamma, p);
        T* u = vectors[0].data();
        for (int64_t i = 0; i < p; i++) u[i] = gamma[i] * e[i];
        normalised.through(u, p, result);
    }

    void read(int64_t n, const Tape& tape) {
        for (int64_t l = 0; l < L; l++) {
            const View<T> input = rows_of(queries(n, l), in[l]);
            T* z = tape.zq[l];
            if (target(l)) product(C, out[l], in[l], input, rows_of(target(l), out[l]), z, false);
            for (int64_t j = 0; j < c; j++)
                product(C, out[l], in[l], input, rows_of(component(state, l, j), out[l]), z, j || target(l),
                        factors(read_of, j));
            dual(n, l);
            product(C, out[l], C, rows_of(weighted.data(), C), rows_of(tape.steps[l], out[l]), z, true, {},
                    {}, LEFT_LOWER);
            if (l + 1 < L)
                activate<T>(P.activation, z, C * out[l], xq[l + 1].data(), slope_q[l + 1].data(), nullptr);
        }
    }

    // scores = x~ x^T and weighted = G * scores, on and below the diagonal; weighted is zero above it.
    void dual(int64_t n, int64_t l) {
        product(C, C, in[l], rows_of(queries(n, l), in[l]), transposed(keys(n, l), in[l]), scores.data(),
                false, {}, {}, RESULT_LOWER);
        const T* g = &G[seen(0) * C];
        for (int64_t t = 0; t < C; t++)
            for (int64_t i = t * C; i <= t * C + t; i++) weighted[i] = scores[i] * g[i];
    }

    void surprise(int64_t n, const Tape& tape, T* norms) {
        for (int64_t t = 0; t < C; t++) {
            T sum = 0;
            for (int64_t l = 0; l < L; l++) {
                const T *input = keys(n, l) + t * in[l], *step = tape.steps[l] + t * out[l];
                sum += dot(input, input, in[l]) * dot(step, step, out[l]);
            }
            norms[t] = std::sqrt(sum);
        }
    }

    void update(int64_t n, const Tape& tape) {
        const T carry[2] = {A[C], M[C]}, cross = F[C];
        for (int64_t l = 0; l < L; l++) {
            T* D = component(state, l, 0);
            const T* S = momentum ? component(state, l, 1) : D;
            for (int64_t i = 0; i < size[l]; i++)
                D[i] = momentum ? carry[0] * D[i] + cross * S[i] : carry[0] * D[i];
            for (int64_t j = 1; j < c; j++) {
                T* stack = component(state, l, j);
                for (int64_t i = 0; i < size[l]; i++) stack[i] *= carry[j];
            }
            for (int64_t j = 0; j < c; j++)
                product(in[l], out[l], C, transposed(keys(n, l), in[l]), rows_of(tape.steps[l], out[l]),
                        component(state, l, j), true, {}, factors(write, j));
        }
    }

    // --- backward ---

    // What the tape does not hold: activations and their derivatives.
    void recall(const Tape& tape) {
        for (int64_t l = 0; l + 1 < L; l++) {
            activate(P.activation, tape.z[l], C * out[l], x[l + 1].data(), slope[l + 1].data(),
                     curvature[l + 1].data());
            activate<T>(P.activation, tape.zq[l], C * out[l], xq[l + 1].data(), slope_q[l + 1].data(),
                        nullptr);
        }
    }

    // The anchor was W of the state that g_state belongs to.
    void anchor_to_state() {
        for (int64_t l = 0; l < L; l++) {
            T* D = component(g_state, l, 0);
            for (int64_t i = 0; i < size[l]; i++) {
                D[i] += g_anchor[place[l] + i];
                g_targets[place[l] + i] += g_anchor[place[l] + i];
            }
        }
        std::fill(g_anchor.begin(), g_anchor.end(), T(0));
    }

    // along [C, in] is the gradient of the input scaled by factors: those of the input (added) and of the
    // factors.
    void scaled_backward(const T* along, const T* input, int64_t width, const std::vector<T>& data,
                         std::vector<T>& g_data, int64_t j, T* g_input, bool first) {
        const Factors<T> scale = factors(data, j);
        T* g_factors = g_data.data() + j;
        for (int64_t t = 0; t < C; t++) {
            const T g = dot(along + t * width, input + t * width, width), factor = scale[t];
            g_factors[t * c] = first ? g : g_factors[t * c] + g;
            for (int64_t i = t * width; i < (t + 1) * width; i++) g_input[i] += factor * along[i];
        }
    }

    // Reverse of `update`; g_state moves from after the chunk to before it. Starts g_x and g_steps.
    void update_backward(int64_t n, const Tape& tape) {
        const T carry[2] = {A[C], M[C]}, cross = F[C];
        g_carry[0] = g_carry[1] = g_cross = 0;
        for (int64_t l = 0; l < L; l++) {
            std::fill(g_x[l].begin(), g_x[l].end(), T(0));
            for (int64_t j = 0; j < c; j++) {
                const T* g = component(g_state, l, j);
                g_carry[j] += dot(g, component(state, l, j), size[l]);
                product(C, in[l], out[l], rows_of(tape.steps[l], out[l]), transposed(g, out[l]),
                        rows_a.data(), false);
                scaled_backward(rows_a.data(), keys(n, l), in[l], write, g_write, j, g_x[l].data(), l == 0);
                product(C, out[l], in[l], rows_of(keys(n, l), in[l]), rows_of(g, out[l]), g_steps[l].data(),
                        j > 0, factors(write, j));
            }
            T* g_D = component(g_state, l, 0);
            if (momentum) {
                T* g_S = component(g_state, l, 1);
                g_cross += dot(g_D, component(state, l, 1), size[l]);
                for (int64_t i = 0; i < size[l]; i++) g_S[i] = carry[1] * g_S[i] + cross * g_D[i];
            }
            for (int64_t i = 0; i < size[l]; i++) g_D[i] *= carry[0];
        }
    }

    // Reverse of `read` and of the outputs; adds to g_state, g_x and g_steps.
    void read_backward(int64_t n, const Tape& tape) {
        const T *g_y = chunk(P.g_y, n, C * p), *seen_G = &G[seen(0) * C];
        T *g_out = rows_b.data(), *g_in = rows_c.data();
        for (int64_t t = 0; t < C; t++) head_backward(tape.zq[L - 1] + t * p, g_y + t * p, g_out + t * p);
        for (int64_t l = L - 1; l >= 0; l--) {
            const T* input = queries(n, l);
            const View<T> g_rows = rows_of(g_out, out[l]);
            if (target(l)) {
                product(C, in[l], out[l], g_rows, transposed(target(l), out[l]), g_in, false);
                product(in[l], out[l], C, transposed(input, in[l]), g_rows, g_targets.data() + place[l],
                        true);
            } else {
                std::fill(g_in, g_in + C * in[l], T(0));
            }
            for (int64_t j = 0; j < c; j++) {
                product(C, in[l], out[l], g_rows, transposed(component(state, l, j), out[l]), rows_a.data(),
                        false);
                scaled_backward(rows_a.data(), input, in[l], read_of, g_read, j, g_in, l == L - 1);
                product(in[l], out[l], C, transposed(input, in[l]), g_rows, component(g_state, l, j), true,
                        {}, factors(read_of, j));
            }
            dual(n, l);
            product(C, out[l], C, transposed(weighted.data(), C), g_rows, g_steps[l].data(), true, {}, {},
                    LEFT_UPPER);
            product(C, C, out[l], g_rows, transposed(tape.steps[l], out[l]), g_scores.data(), false, {}, {},
                    RESULT_LOWER);
            for (int64_t t = 0; t < C; t++) {
                for (int64_t i = t * C; i <= t * C + t; i++) {
                    const T g = scores[i] * g_scores[i];
                    g_G[i] = l == L - 1 ? g : g_G[i] + g;
                    g_scores[i] *= seen_G[i];
                }
                std::fill_n(&g_scores[t * C] + t + 1, C - t - 1, T(0));
            }
            product(C, in[l], C, transposed(g_scores.data(), C), rows_of(input, in[l]), g_x[l].data(), true,
                    {}, {}, LEFT_UPPER);
            product(C, in[l], C, rows_of(g_scores.data(), C), rows_of(keys(n, l), in[l]), g_in, true, {}, {},
                    LEFT_LOWER);
            if (l)
                for (int64_t i = 0; i < C * in[l]; i++) g_out[i] = g_in[i] * slope_q[l][i];
        }
        T* g_q = chunk(P.g_q, n, C * p);
        for (int64_t i = 0; i < C * p; i++) g_q[i] = g_in[i] + (P.norm == NONE ? T(0) : g_y[i]);
    }

    // Reverse of `coefficients`.
    void coefficients_backward(int64_t n) {
        T *g_theta = chunk(P.g_theta, n, C), *g_eta = momentum ? chunk(P.g_eta, n, C) : nullptr;
        T* g_alpha = P.alpha ? chunk(P.g_alpha, n, C) : nullptr;
        // Gradients of row t + 1, from the end of the chunk on.
        T back_A = g_carry[0], back_M = g_carry[1], back_F = g_cross;
        for (int64_t j = 0; j < C; j++) {
            back_G[j] = g_write[j * c];
            back_E[j] = momentum ? g_write[j * c + 1] : T(0);
        }
        for (int64_t t = C - 1; t >= 0; t--) {
            const int64_t reader = P.exclusive ? t + 1 : t;  // the token that sees row t + 1
            if (reader < C) {
                for (int64_t j = 0; j <= t; j++) back_G[j] += g_G[reader * C + j];
                back_A += g_read[reader * c];
                if (momentum) back_F += g_read[reader * c + 1];
            }
            const bool here = present(n, t);
            if (here) {
                for (int64_t j = 0; j <= t; j++) back_E[j] += back_G[j];
                back_M += back_F;
            }
            g_theta[t] = here ? back_E[t] : T(0);
            if (momentum) g_eta[t] = here ? dot(back_E.data(), &E[t * C], t) + back_M * M[t] : T(0);
            if (g_alpha)
                g_alpha[t] =
                    here ? -(dot(back_G.data(), &G[t * C], t) + back_F * F[t] + back_A * A[t]) : T(0);
            for (int64_t j = 0; j <= t; j++) back_E[j] *= hold[t], back_G[j] *= keep[t];
            back_M *= hold[t], back_F *= keep[t], back_A *= keep[t];
        }
    }

    // Gradient of z from that of f at one token; adds those of gamma and beta. Leaves the token in
    // `normalised`.
    void head_backward(const T* z, const T* g_f, T* g_z_row) {
        if (P.norm != RESIDUAL_LAYERNORM) {
            std::memcpy(g_z_row, g_f, sizeof(T) * p);
            return;
        }
        const T* gamma = of(P.gamma, p);
        normalised.of(z, p, P.norm_eps);
        T* u = vectors[0].data();
        for (int64_t i = 0; i < p; i++) {
            u[i] = gamma[i] * g_f[i];
            g_gamma[i] += g_f[i] * normalised.zh[i];
            g_beta[i] += g_f[i];
        }
        normalised.through(u, p, g_z_row);
    }

    // Reverse of `write_gradients`, with its second-order terms, from g_x and g_steps.
    void write_backward(int64_t n, const Tape& tape) {
        // u_l = (u_{l+1} W_{l+1}^T) phi'(z_l): the reverse of pulling steps down walks up.
        for (int64_t l = 0; l + 1 < L; l++) {
            T* back = rows_c.data();
            for (int64_t i = 0; i < C * out[l]; i++) {
                g_z[l][i] = g_steps[l][i] * tape.pulled[l][i] * curvature[l + 1][i];
                back[i] = g_steps[l][i] * slope[l + 1][i];
            }
            const T* w = anchor.data() + place[l + 1];
            product(in[l + 1], out[l + 1], C, transposed<T>(back, in[l + 1]),
                    rows_of(tape.steps[l + 1], out[l + 1]), g_anchor.data() + place[l + 1], true);
            product(C, out[l + 1], in[l + 1], rows_of<T>(back, in[l + 1]), rows_of(w, out[l + 1]),
                    g_steps[l + 1].data(), true);
        }
        T *g_v = chunk(P.g_v, n, C * p), *g_f = rows_c.data();
        for (int64_t t = 0; t < C; t++) error_backward(n, t, tape, g_f + t * p, g_v + t * p);
        for (int64_t l = L - 1; l >= 0; l--) {
            const T* w = anchor.data() + place[l];
            product(in[l], out[l], C, transposed(keys(n, l), in[l]), rows_of(g_z[l].data(), out[l]),
                    g_anchor.data() + place[l], true);
            product(C, in[l], out[l], rows_of(g_z[l].data(), out[l]), transposed(w, out[l]), g_x[l].data(),
                    true);
            if (l)
                for (int64_t i = 0; i < C * in[l]; i++) g_z[l - 1][i] += g_x[l][i] * slope[l][i];
        }
        T* g_k = chunk(P.g_k, n, C * p);
        for (int64_t i = 0; i < C * p; i++) g_k[i] = g_x[0][i] + (P.norm == NONE ? T(0) : g_f[i]);
    }

    // From the gradient of the last step of token t to those of z, f and v.
    void error_backward(int64_t n, int64_t t, const Tape& tape, T* g_f, T* g_v) {
        T *g_row = g_z[L - 1].data() + t * p, *e = rows_a.data() + t * p;
        const T* g_step = g_steps[L - 1].data() + t * p;
        T* g_e = vectors[1].data();
        std::fill(g_row, g_row + p, T(0));
        if (P.norm == RESIDUAL_LAYERNORM) {
            // delta = P u / s depends on z through 1/s (a part proportional to delta) and through zh; P is
            // linear, so that the projections of the latter part are delta and g_u again.
            const T* gamma = of(P.gamma, p);
            T *g_u = vectors[2].data(), *g_delta = vectors[3].data(), *u = vectors[4].data(),
              *d = vectors[5].data();
            error(n, t, tape);
            for (int64_t i = 0; i < p; i++)
                g_delta[i] = -g_step[i], u[i] = gamma[i] * e[i], d[i] = -tape.steps[L - 1][t * p + i];
            normalised.through(g_delta, p, g_u);
            const T* zh = normalised.zh.data();
            const T on_delta = dot<T>(g_delta, d, p), on_u = dot<T>(u, zh, p), on_zh = dot<T>(g_delta, zh, p);
            const T factor = -normalised.inverse_std / p;
            for (int64_t i = 0; i < p; i++) {
                g_row[i] = factor * (zh[i] * on_delta + g_u[i] * on_u + d[i] * on_zh);
                g_gamma[i] += e[i] * g_u[i];
                g_e[i] = gamma[i] * g_u[i];
            }
        } else {
            for (int64_t i = 0; i < p; i++) g_e[i] = -g_step[i];
        }
        for (int64_t i = 0; i < p; i++) {
            g_f[i] = P.loss == L2 ? T(P.loss_scale) * g_e[i] : T(0);
            g_v[i] = -T(P.loss_scale) * g_e[i];
        }
        if (P.loss != L2) return;
        T* through = vectors[2].data();
        head_backward(tape.z[L - 1] + t * p, g_f, through);
        for (int64_t i = 0; i < p; i++) g_row[i] += through[i];
    }
};

// 1 if there is not enough memory, else 0.
template <class T>
int run(const Problem& problem, bool backward) {
    const int64_t threads = std::min(problem.threads, problem.sequences);
    std::vector<Walk<T>> walks;
    try {
        walks.reserve(threads);
        for (int64_t i = 0; i < threads; i++) walks.emplace_back(problem, backward);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    // A team of as many threads as PyTorch's, though some may find nothing to do: OpenMP would end the
    // surplus threads of a smaller team, and PyTorch's next operation start them again.
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(problem.threads) if (threads > 1)
    if (omp_get_thread_num() < threads)
        for (int64_t m; (m = next++) < problem.sequences;) {
            Walk<T>& walk = walks[omp_get_thread_num()];
            backward ? walk.backward(m) : walk.forward(m);
        }
    return 0;
}

}  // namespace

// Compiled for one REAL, float or double; a library holds one.
extern "C" {
int64_t nestor_problem_size() {
    return sizeof(Problem);
}
int64_t nestor_states_size(const Problem* problem) {
    return Walk<REAL>::states_size(*problem);
}
int64_t nestor_tape_size(const Problem* problem) {
    return Walk<REAL>::tape_size(*problem);
}
int nestor_scan(const Problem* problem, int backward) {
    return run<REAL>(*problem, backward);
}
}
