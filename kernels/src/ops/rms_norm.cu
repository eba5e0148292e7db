// One block normalizes one row and keeps it in registers between the sum of squares and the scaling, so that every
// operand is read once. The suffix of an entry point is the largest number of columns that it serves. Longer rows, and
// rows that are not aligned, are read twice, the second time from the cache.

struct Operand {
    const bf16* p;
    i64 stride;
};

struct Result {
    bf16* p;
    i64 stride;
};

__device__ __forceinline__ bool is_wide(Operand x) { return aligned16(x.p, x.stride); }
__device__ __forceinline__ bool is_wide(Result x) { return aligned16(x.p, x.stride); }

template <int THREADS> __device__ __forceinline__ float reciprocal_root(float squares, u32 cols, float eps) {
    return 1.0f / sqrtf(block_sum<THREADS>(squares) / (float)max(cols, 1u) + eps);
}

template <int THREADS, typename Width>
__device__ __forceinline__ void forward_looped(Result y, float* rstd, Operand x, const float* weight, u32 cols,
                                               float eps, Width width) {
    constexpr int N = Width::N;
    const u32 row = blockIdx.x;
    float squares = 0.0f;
    for (u32 k = threadIdx.x; k * N < cols; k += THREADS) {
        const Span s = span_of_row(row, k, cols, width);
        const auto v = load_span(x.p, x.stride, s, width);
#pragma unroll
        for (int i = 0; i < N; i++) squares += v.v[i] * v.v[i];
    }
    const float r = reciprocal_root<THREADS>(squares, cols, eps);
    if (threadIdx.x == 0) rstd[row] = r;
    for (u32 k = threadIdx.x; k * N < cols; k += THREADS) {
        const Span s = span_of_row(row, k, cols, width);
        auto v = load_span(x.p, x.stride, s, width);
        const auto w = load_span(weight, 0, Span{0, s.col, s.present}, width);
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] = v.v[i] * r * w.v[i];
        store_span(y.p, y.stride, s, width, v);
    }
}

// y = x rstd weight. SPANS = 0: any number of columns.
template <int THREADS, int SPANS>
__device__ __forceinline__ void forward(Result y, float* rstd, Operand x, const float* weight, u32 cols, float eps) {
    if (!(is_wide(y) && is_wide(x) && aligned16(weight, 0) && cols % 8 == 0)) {
        forward_looped<THREADS>(y, rstd, x, weight, cols, eps, Narrow{});
        return;
    }
    const Wide width;
    if constexpr (SPANS == 0) {
        forward_looped<THREADS>(y, rstd, x, weight, cols, eps, width);
    } else {
        const u32 row = blockIdx.x;
        f32x8 v[SPANS], w[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_row(row, threadIdx.x + u * THREADS, cols, width);
            v[u] = load_span(x.p, x.stride, s, width);
            w[u] = load_span(weight, 0, Span{0, s.col, s.present}, width);
        }
        float squares = 0.0f;
#pragma unroll
        for (int u = 0; u < SPANS; u++)
#pragma unroll
            for (int i = 0; i < 8; i++) squares += v[u].v[i] * v[u].v[i];
        const float r = reciprocal_root<THREADS>(squares, cols, eps);
        if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_row(row, threadIdx.x + u * THREADS, cols, width);
#pragma unroll
            for (int i = 0; i < 8; i++) v[u].v[i] = v[u].v[i] * r * w[u].v[i];
            store_span(y.p, y.stride, s, width, v[u]);
        }
    }
}

template <int THREADS, typename Width>
__device__ __forceinline__ void backward_looped(Result dx, Operand dy, Operand x, const float* rstd,
                                                const float* weight, u32 cols, Width width) {
    constexpr int N = Width::N;
    const u32 row = blockIdx.x;
    const float r = rstd[row];
    float dot = 0.0f;
    for (u32 k = threadIdx.x; k * N < cols; k += THREADS) {
        const Span s = span_of_row(row, k, cols, width);
        const auto d = load_span(dy.p, dy.stride, s, width), v = load_span(x.p, x.stride, s, width);
        const auto w = load_span(weight, 0, Span{0, s.col, s.present}, width);
#pragma unroll
        for (int i = 0; i < N; i++) dot += w.v[i] * d.v[i] * v.v[i];
    }
    const float pull = r * r * (block_sum<THREADS>(dot) / (float)cols);
    for (u32 k = threadIdx.x; k * N < cols; k += THREADS) {
        const Span s = span_of_row(row, k, cols, width);
        const auto d = load_span(dy.p, dy.stride, s, width), v = load_span(x.p, x.stride, s, width);
        const auto w = load_span(weight, 0, Span{0, s.col, s.present}, width);
        auto old = load_span(dx.p, dx.stride, s, width);
#pragma unroll
        for (int i = 0; i < N; i++) old.v[i] += r * (w.v[i] * d.v[i] - v.v[i] * pull);
        store_span(dx.p, dx.stride, s, width, old);
    }
}

// dx += rstd (weight dy - x rstd^2 mean(weight dy x)). SPANS = 0: any number of columns.
template <int THREADS, int SPANS>
__device__ __forceinline__ void backward(Result dx, Operand dy, Operand x, const float* rstd, const float* weight,
                                         u32 cols) {
    if (!(is_wide(dx) && is_wide(dy) && is_wide(x) && aligned16(weight, 0) && cols % 8 == 0)) {
        backward_looped<THREADS>(dx, dy, x, rstd, weight, cols, Narrow{});
        return;
    }
    const Wide width;
    if constexpr (SPANS == 0) {
        backward_looped<THREADS>(dx, dy, x, rstd, weight, cols, width);
    } else {
        const u32 row = blockIdx.x;
        f32x8 d[SPANS], v[SPANS], old[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_row(row, threadIdx.x + u * THREADS, cols, width);
            d[u] = load_span(dy.p, dy.stride, s, width);
            v[u] = load_span(x.p, x.stride, s, width);
            old[u] = load_span(dx.p, dx.stride, s, width);
        }
        const float r = rstd[row];
        float dot = 0.0f;
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_row(0, threadIdx.x + u * THREADS, cols, width);
            const f32x8 w = load_span(weight, 0, s, width);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                d[u].v[i] *= w.v[i];
                dot += d[u].v[i] * v[u].v[i];
            }
        }
        const float pull = r * r * (block_sum<THREADS>(dot) / (float)cols);
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_row(row, threadIdx.x + u * THREADS, cols, width);
#pragma unroll
            for (int i = 0; i < 8; i++) old[u].v[i] += r * (d[u].v[i] - v[u].v[i] * pull);
            store_span(dx.p, dx.stride, s, width, old[u]);
        }
    }
}

// The same for the rows of chunk blockIdx.x, and partial[blockIdx.x, n] = sum over them of dx (x - to), with dx as it is
// stored: the bits of row_scale_backward_rows. A thread keeps its columns from row to row, so that their sums stay in
// registers. Rows are aligned and have a span per thread at most.
template <int THREADS>
__device__ __forceinline__ void backward_columns(Result dx, float* partial, Operand dy, Operand x, Operand to,
                                                 const float* rstd, const float* weight, u32 rows, u32 cols,
                                                 u32 chunk) {
    const Wide width;
    f32x8 sum = {};
    const u32 end = min(rows, (blockIdx.x + 1) * chunk);
    // A row as it is stored: it is fetched while the one before waits for its sum.
    struct Stored {
        uint4 dy, dx, x, to;
        float rstd;
    };
    const u32 col = threadIdx.x * 8;
    const auto fetch = [&](u32 row) {
        const uint4 none = make_uint4(0, 0, 0, 0);
        Stored stored = {none, none, none, none, 0.0f};
        if (row >= end || col >= cols) return stored;
        stored.dy = *reinterpret_cast<const uint4*>(dy.p + row * dy.stride + col);
        stored.dx = *reinterpret_cast<const uint4*>(dx.p + row * dx.stride + col);
        stored.x = *reinterpret_cast<const uint4*>(x.p + row * x.stride + col);
        stored.to = *reinterpret_cast<const uint4*>(to.p + row * to.stride + col);
        stored.rstd = rstd[row];
        return stored;
    };
    Stored next = fetch(blockIdx.x * chunk);
#pragma unroll 1
    for (u32 row = blockIdx.x * chunk; row < end; row++) {
        const Stored stored = next;
        next = fetch(row + 1);
        const Span s = span_of_row(row, threadIdx.x, cols, width);
        f32x8 d = unpack8(stored.dy);
        const f32x8 v = unpack8(stored.x);
        const float r = stored.rstd;
        // From the cache every time: there are no registers left.
        const f32x8 w = load_span(weight, 0, Span{0, s.col, s.present}, width);
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            d.v[i] *= w.v[i];
            dot += d.v[i] * v.v[i];
        }
        const float pull = r * r * (block_sum<THREADS>(dot) / (float)cols);
        f32x8 old = unpack8(stored.dx);
        const f32x8 before = unpack8(stored.to);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            old.v[i] = to_f32(to_bf16(old.v[i] + r * (d.v[i] - v.v[i] * pull)));
            sum.v[i] = fmaf(old.v[i], v.v[i] - before.v[i], sum.v[i]);
        }
        store_span(dx.p, dx.stride, s, width, old);
    }
    const Span s = span_of_row(blockIdx.x, threadIdx.x, cols, width);
    if (!s.present) return;
#pragma unroll
    for (int i = 0; i < 8; i++) partial[(i64)s.row * cols + s.col + i] = sum.v[i];
}

// Blocks: one per row.
#define ENTRIES(SUFFIX, THREADS, SPANS, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        rms_norm_forward_##SUFFIX(bf16* y, i32 y_stride, float* rstd, const bf16* x, i32 x_stride,                     \
                                  const float* weight, i32 cols, float eps) {                                          \
        forward<THREADS, SPANS>({y, y_stride}, rstd, {x, x_stride}, weight, cols, eps);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) rms_norm_backward_##SUFFIX(                          \
        bf16* dx, i32 dx_stride, const bf16* dy, i32 dy_stride, const bf16* x, i32 x_stride, const float* rstd,        \
        const float* weight, i32 cols) {                                                                               \
        backward<THREADS, SPANS>({dx, dx_stride}, {dy, dy_stride}, {x, x_stride}, rstd, weight, cols);                 \
    }

ENTRIES(1024, 128, 1, 8)
ENTRIES(2048, 256, 1, 4)
ENTRIES(4096, 256, 2, 4)
ENTRIES(8192, 512, 2, 2)
ENTRIES(any, 512, 0, 2)

// Blocks: one per chunk of rows. As many threads as a row of so many columns has spans.
#define COLUMNS(SUFFIX, BLOCKS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(SUFFIX / 8, BLOCKS) rms_norm_backward_columns_##SUFFIX(               \
        bf16* dx, i32 dx_stride, float* partial, const bf16* dy, i32 dy_stride, const bf16* x, i32 x_stride,           \
        const bf16* to, i32 to_stride, const float* rstd, const float* weight, i32 rows, i32 cols, i32 chunk) {        \
        backward_columns<SUFFIX / 8>({dx, dx_stride}, partial, {dy, dy_stride}, {x, x_stride}, {to, to_stride}, rstd,  \
                                     weight, rows, cols, chunk);                                                       \
    }

COLUMNS(1024, 8)
COLUMNS(2048, 4)
COLUMNS(4096, 2)
COLUMNS(8192, 1)
