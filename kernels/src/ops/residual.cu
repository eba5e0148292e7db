// Two spans per thread, both in flight before the first is added.

constexpr int THREADS = 256;
constexpr int SPANS = 2;

// y = x + branch; `y` may be `x`. The backward pass is dx = dx + dy.
extern "C" __global__ void __launch_bounds__(THREADS)
    residual_add(bf16* y, i32 y_stride, const bf16* x, i32 x_stride, const bf16* branch, i32 branch_stride, i32 rows,
                 i32 cols) {
    const bool wide =
        aligned16(y, y_stride) && aligned16(x, x_stride) && aligned16(branch, branch_stride) && cols % 8 == 0;
    for_spans<THREADS, SPANS>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        f32xn<N> a[SPANS], b[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
            a[u] = load_span(x, x_stride, s, width);
            b[u] = load_span(branch, branch_stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const Span s = span_of_matrix(first + u * THREADS, rows, cols, width);
#pragma unroll
            for (int i = 0; i < N; i++) a[u].v[i] += b[u].v[i];
            store_span(y, y_stride, s, width, a[u]);
        }
    });
}
