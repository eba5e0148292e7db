// The gated activations y = act(gate) up: SiLU (swiglu) and the tanh form of GELU (geglu).
//
// Both are gate * s(gate) with a logistic s, so one template serves them. The backward pass recomputes s, and where y
// is wanted again (`_output`) leaves it on the way: one write, with the bits of the forward pass. The form `_scaled` of the
// forward pass takes gate and up less a factor per column each (the row factors of DoRA), and the form `_columns` of the
// backward pass, which takes the same, also adds up dgate * gate and dup * up over the tokens, from the registers that
// hold them: what the magnitudes of DoRA need, at no pass over memory.

constexpr int THREADS = 256;
constexpr int SPANS = 2;

struct Operand {
    const bf16* p;
    i64 stride;
};

struct Result {
    bf16* p;
    i64 stride;
};

// A result that nobody wants: a type, so that kernels without it have no trace of it.
struct Nowhere {};

__device__ __forceinline__ bool is_wide(Operand x) { return aligned16(x.p, x.stride); }
__device__ __forceinline__ bool is_wide(Result x) { return aligned16(x.p, x.stride); }
__device__ __forceinline__ bool is_wide(Nowhere) { return true; }

template <typename Width, int N>
__device__ __forceinline__ void store_result(Result y, Span s, Width width, const f32xn<N>& x) {
    store_span(y.p, y.stride, s, width, x);
}
template <typename Width, int N>
__device__ __forceinline__ void store_result(Nowhere, Span, Width, const f32xn<N>&) {}

// What the columns of gate and up are multiplied by: a type, as above.
struct Factors {
    const float *gate, *up;
};
struct Ones {};

__device__ __forceinline__ bool is_wide(Factors f) { return aligned16(f.gate, 0) && aligned16(f.up, 0); }
__device__ __forceinline__ bool is_wide(Ones) { return true; }

template <typename Width, int N>
__device__ __forceinline__ void multiply(Factors f, Span s, Width width, f32xn<N>& gate, f32xn<N>& up) {
    const Span of_row = {0, s.col, s.present};
    const f32xn<N> a = load_span(f.gate, 0, of_row, width), b = load_span(f.up, 0, of_row, width);
#pragma unroll
    for (int i = 0; i < N; i++) {
        gate.v[i] *= a.v[i];
        up.v[i] *= b.v[i];
    }
}
template <typename Width, int N>
__device__ __forceinline__ void multiply(Ones, Span, Width, f32xn<N>&, f32xn<N>&) {}

template <typename Gate, typename F>
__device__ __forceinline__ void forward(Result y, Operand gate, Operand up, F factors, u32 rows, u32 cols) {
    const bool wide = is_wide(y) && is_wide(gate) && is_wide(up) && is_wide(factors) && cols % 8 == 0;
    for_spans<THREADS, SPANS>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        f32xn<N> g[SPANS], v[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
            g[u] = load_span(gate.p, gate.stride, s, width);
            v[u] = load_span(up.p, up.stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
            multiply(factors, s, width, g[u], v[u]);
#pragma unroll
            for (int i = 0; i < N; i++) v[u].v[i] *= Gate::at(g[u].v[i]).value;
            store_span(y.p, y.stride, s, width, v[u]);
        }
    });
}

// g becomes dgate = dy up act'(gate), v becomes dup = dy act(gate), d becomes y = act(gate) up.
template <typename Gate, int N> __device__ __forceinline__ void gradients(f32xn<N>& g, f32xn<N>& v, f32xn<N>& d) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Act act = Gate::at(g.v[i]);
        const float dy = d.v[i], up = v.v[i];
        g.v[i] = dy * up * act.slope;
        v.v[i] = dy * act.value;
        d.v[i] = up * act.value;
    }
}

// A result may overwrite any of the inputs: an element is written by the thread that has read it.
template <typename Gate, typename Y>
__device__ __forceinline__ void backward(Result dgate, Result dup, Y y, Operand dy, Operand gate, Operand up, u32 rows,
                                         u32 cols) {
    const bool wide = is_wide(dgate) && is_wide(dup) && is_wide(y) && is_wide(dy) && is_wide(gate) && is_wide(up) &&
                      cols % 8 == 0;
    for_spans<THREADS, SPANS>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        f32xn<N> d[SPANS], g[SPANS], v[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
            d[u] = load_span(dy.p, dy.stride, s, width);
            g[u] = load_span(gate.p, gate.stride, s, width);
            v[u] = load_span(up.p, up.stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
            gradients<Gate>(g[u], v[u], d[u]);
            store_span(dgate.p, dgate.stride, s, width, g[u]);
            store_span(dup.p, dup.stride, s, width, v[u]);
            store_result(y, s, width, d[u]);
        }
    });
}

// Columns col .. + 32 N of the rows of chunk blockIdx.y, a warp every eighth row.
template <typename Gate, typename Y, typename Width>
__device__ __forceinline__ void backward_strip(Result dgate, Result dup, Y y, float* gate_sums, float* up_sums,
                                               Operand dy, Operand gate, Operand up, Factors factors, u32 rows,
                                               u32 cols, u32 chunk, u32 col, Width width) {
    constexpr int N = Width::N;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 end = min(rows, (blockIdx.y + 1) * chunk);
    const bool inside = col + lane * N < cols;
    f32xn<N> gate_sum = {}, up_sum = {};
    for (u32 row = blockIdx.y * chunk + warp; row < end; row += 8 * SPANS) {
        f32xn<N> d[SPANS], g[SPANS], v[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = {row + 8 * u, col + lane * N, inside && row + 8 * u < end};
            d[u] = load_span(dy.p, dy.stride, s, width);
            g[u] = load_span(gate.p, gate.stride, s, width);
            v[u] = load_span(up.p, up.stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = {row + 8 * u, col + lane * N, inside && row + 8 * u < end};
            multiply(factors, s, width, g[u], v[u]);
            f32xn<N> dg = g[u], dv = v[u];
            gradients<Gate>(dg, dv, d[u]);
            store_result(y, s, width, d[u]);
#pragma unroll
            for (int i = 0; i < N; i++) {
                gate_sum.v[i] += dg.v[i] * g[u].v[i];
                up_sum.v[i] += dv.v[i] * v[u].v[i];
            }
            multiply(factors, s, width, dg, dv);
            store_span(dgate.p, dgate.stride, s, width, dg);
            store_span(dup.p, dup.stride, s, width, dv);
        }
    }
    store_column_sums(gate_sums + (i64)blockIdx.y * cols, gate_sum, col, cols);
    store_column_sums(up_sums + (i64)blockIdx.y * cols, up_sum, col, cols);
}

// Block (x, y): columns 256 x .. + 256 of rows `chunk` y .. + chunk. gate_sums, up_sums: (gridDim.y, cols).
template <typename Gate, typename Y>
__device__ __forceinline__ void backward_columns(Result dgate, Result dup, Y y, float* gate_sums, float* up_sums,
                                                 Operand dy, Operand gate, Operand up, Factors factors, u32 rows,
                                                 u32 cols, u32 chunk) {
    const u32 col = blockIdx.x * 256;
    const bool wide = is_wide(dgate) && is_wide(dup) && is_wide(y) && is_wide(dy) && is_wide(gate) && is_wide(up) &&
                      is_wide(factors) && cols % 8 == 0;
    if (wide) {
        backward_strip<Gate>(dgate, dup, y, gate_sums, up_sums, dy, gate, up, factors, rows, cols, chunk, col, Wide{});
        return;
    }
#pragma unroll 1
    for (u32 k = 0; k < 8; k++) {
        const u32 first = col + 32 * k;
        backward_strip<Gate>(dgate, dup, y, gate_sums, up_sums, dy, gate, up, factors, rows, cols, chunk, first,
                             Narrow{});
    }
}

#define ENTRIES(NAME, GATE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME##_forward(bf16* y, i32 y_stride, const bf16* gate, i32 gate_stride, const bf16* up, i32 up_stride,        \
                       i32 rows, i32 cols) {                                                                           \
        forward<GATE>({y, y_stride}, {gate, gate_stride}, {up, up_stride}, Ones{}, rows, cols);                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME##_forward_scaled(bf16* y, i32 y_stride, const bf16* gate, i32 gate_stride, const bf16* up, i32 up_stride, \
                              i32 rows, i32 cols, const float* gate_factor, const float* up_factor) {                  \
        forward<GATE>({y, y_stride}, {gate, gate_stride}, {up, up_stride}, Factors{gate_factor, up_factor}, rows,      \
                      cols);                                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME##_backward(bf16* dgate, i32 dgate_stride, bf16* dup, i32 dup_stride, const bf16* dy, i32 dy_stride,       \
                        const bf16* gate, i32 gate_stride, const bf16* up, i32 up_stride, i32 rows, i32 cols) {        \
        backward<GATE>({dgate, dgate_stride}, {dup, dup_stride}, Nowhere{}, {dy, dy_stride}, {gate, gate_stride},      \
                       {up, up_stride}, rows, cols);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        NAME##_backward_columns(bf16* dgate, i32 dgate_stride, bf16* dup, i32 dup_stride, float* gate_sums,            \
                                float* up_sums, const bf16* dy, i32 dy_stride, const bf16* gate, i32 gate_stride,      \
                                const bf16* up, i32 up_stride, const float* gate_factor, const float* up_factor,       \
                                i32 rows, i32 cols, i32 chunk) {                                                       \
        backward_columns<GATE>({dgate, dgate_stride}, {dup, dup_stride}, Nowhere{}, gate_sums, up_sums,                \
                               {dy, dy_stride}, {gate, gate_stride}, {up, up_stride}, {gate_factor, up_factor}, rows,  \
                               cols, chunk);                                                                           \
    }

ENTRIES(swiglu, Silu)
ENTRIES(geglu, GeluTanh)

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward_output(bf16* dgate, i32 dgate_stride, bf16* dup, i32 dup_stride, const bf16* dy, i32 dy_stride,
                           const bf16* gate, i32 gate_stride, const bf16* up, i32 up_stride, i32 rows, i32 cols,
                           bf16* y, i32 y_stride) {
    backward<Silu>({dgate, dgate_stride}, {dup, dup_stride}, Result{y, y_stride}, {dy, dy_stride}, {gate, gate_stride},
                   {up, up_stride}, rows, cols);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    swiglu_backward_columns_output(bf16* dgate, i32 dgate_stride, bf16* dup, i32 dup_stride, float* gate_sums,
                                   float* up_sums, const bf16* dy, i32 dy_stride, const bf16* gate, i32 gate_stride,
                                   const bf16* up, i32 up_stride, const float* gate_factor, const float* up_factor,
                                   i32 rows, i32 cols, i32 chunk, bf16* y, i32 y_stride) {
    backward_columns<Silu>({dgate, dgate_stride}, {dup, dup_stride}, Result{y, y_stride}, gate_sums, up_sums,
                           {dy, dy_stride}, {gate, gate_stride}, {up, up_stride}, {gate_factor, up_factor}, rows, cols,
                           chunk);
}
