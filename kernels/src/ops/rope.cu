// A thread rotates neighbouring pairs of one head of one token: columns j .. of the lower half with those of the upper
// half. The table's row is shared by all heads of a token and stays in the cache.

constexpr int THREADS = 256;

// direction: 1 forward, -1 backward.
__device__ __forceinline__ void rotate(bf16* x, i64 x_stride, const float* table, i64 table_stride,
                                       const u32* positions, u32 rows, u32 heads, u32 half, float direction) {
    const bool wide = aligned16(x, x_stride) && aligned16(table, table_stride) && half % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        // The matrix of all lower halves.
        const Span pairs = span_of_matrix(first, rows, heads * half, width);
        const u32 head = pairs.col / half, j = pairs.col - head * half;
        const Span lower = {pairs.row, head * 2 * half + j, pairs.present};
        const Span upper = {pairs.row, lower.col + half, pairs.present};
        const u32 position = pairs.present ? positions[pairs.row] : 0;
        const auto a = load_span(x, x_stride, lower, width), b = load_span(x, x_stride, upper, width);
        const auto cos = load_span(table, table_stride, Span{position, j, pairs.present}, width);
        const auto sin = load_span(table, table_stride, Span{position, half + j, pairs.present}, width);
        f32xn<N> p, q;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float s = sin.v[i] * direction;
            p.v[i] = a.v[i] * cos.v[i] - b.v[i] * s;
            q.v[i] = b.v[i] * cos.v[i] + a.v[i] * s;
        }
        store_span(x, x_stride, lower, width, p);
        store_span(x, x_stride, upper, width, q);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_forward(bf16* x, i32 x_stride, const float* table, i32 table_stride, const u32* positions, i32 rows,
                 i32 heads, i32 half) {
    rotate(x, x_stride, table, table_stride, positions, rows, heads, half, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_backward(bf16* dx, i32 dx_stride, const float* table, i32 table_stride, const u32* positions, i32 rows,
                  i32 heads, i32 half) {
    rotate(dx, dx_stride, table, table_stride, positions, rows, heads, half, -1.0f);
}
