// The mask of rng.rs: word i of Philox4x32-10 under the seed, with the stream in the upper half of the counter, decides
// over element i = row * columns + column. So it is the mask of the CPU, whatever the launch looks like.

constexpr int THREADS = 256;

// What the N elements from index `first` on are multiplied by: 0 below the threshold, else `scale`.
template <int N>
__device__ __forceinline__ f32xn<N> factors(u64 first, u64 seed, u64 stream, u32 threshold, float scale) {
    f32xn<N> f;
    if constexpr (N == 8) {
        // A row of whole spans starts at a multiple of eight.
        const RandomWords a = philox(first / 4, stream, seed), b = philox(first / 4 + 1, stream, seed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            f.v[i] = a.w[i] < threshold ? 0.0f : scale;
            f.v[i + 4] = b.w[i] < threshold ? 0.0f : scale;
        }
    } else {
        const RandomWords a = philox(first / 4, stream, seed);
        const u32 lane = (u32)first % 4;
        const u32 word = lane == 0 ? a.w[0] : lane == 1 ? a.w[1] : lane == 2 ? a.w[2] : a.w[3];
        f.v[0] = word < threshold ? 0.0f : scale;
    }
    return f;
}

// y = x mask scale; `y` may be `x`.
extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_forward(bf16* y, i32 y_stride, const bf16* x, i32 x_stride, i32 rows, i32 cols, u64 seed, u64 stream,
                    u32 threshold, float scale) {
    const bool wide = aligned16(y, y_stride) && aligned16(x, x_stride) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        const Span s = span_of_matrix(first, rows, cols, width);
        auto v = load_span(x, x_stride, s, width);
        const auto f = factors<N>((u64)s.row * (u32)cols + s.col, seed, stream, threshold, scale);
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] *= f.v[i];
        store_span(y, y_stride, s, width, v);
    });
}

// dx += dy mask scale.
extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_backward(bf16* dx, i32 dx_stride, const bf16* dy, i32 dy_stride, i32 rows, i32 cols, u64 seed, u64 stream,
                     u32 threshold, float scale) {
    const bool wide = aligned16(dx, dx_stride) && aligned16(dy, dy_stride) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        const Span s = span_of_matrix(first, rows, cols, width);
        auto v = load_span(dx, dx_stride, s, width);
        const auto d = load_span(dy, dy_stride, s, width);
        const auto f = factors<N>((u64)s.row * (u32)cols + s.col, seed, stream, threshold, scale);
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] += d.v[i] * f.v[i];
        store_span(dx, dx_stride, s, width, v);
    });
}
