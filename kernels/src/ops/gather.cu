// Rows picked by index.

constexpr int THREADS = 256;

// y[i] = x[indices[i]].
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_forward(bf16* y, i32 y_stride, const bf16* x, i32 x_stride, const u32* indices, i32 rows, i32 cols) {
    const bool wide = aligned16(y, y_stride) && aligned16(x, x_stride) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        const Span to = span_of_matrix(first, rows, cols, width);
        const Span from = {to.present ? indices[to.row] : 0, to.col, to.present};
        store_span(y, y_stride, to, width, load_span(x, x_stride, from, width));
    });
}

// dx[indices[i]] += dy[i] for indices that differ: the host launches once per run of rising indices.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_backward(bf16* dx, i32 dx_stride, const bf16* dy, i32 dy_stride, const u32* indices, i32 rows, i32 cols) {
    const bool wide = aligned16(dx, dx_stride) && aligned16(dy, dy_stride) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        const Span from = span_of_matrix(first, rows, cols, width);
        const Span to = {from.present ? indices[from.row] : 0, from.col, from.present};
        const auto d = load_span(dy, dy_stride, from, width);
        auto v = load_span(dx, dx_stride, to, width);
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] += d.v[i];
        store_span(dx, dx_stride, to, width, v);
    });
}
