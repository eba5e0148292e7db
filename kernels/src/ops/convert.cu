// Copies between strided matrices, with a change of type where source and destination differ, and fills.

constexpr int THREADS = 256;
constexpr int SPANS = 2;

template <typename To, typename From>
__device__ __forceinline__ void copy(To* y, i64 y_stride, const From* x, i64 x_stride, u32 rows, u32 cols) {
    const bool wide = aligned16(y, y_stride) && aligned16(x, x_stride) && cols % 8 == 0;
    for_spans<THREADS, SPANS>(wide, [&](auto width, u32 first) {
        f32xn<decltype(width)::N> v[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++)
            v[u] = load_span(x, x_stride, span_of_matrix(first + u * THREADS, rows, cols, width), width);
#pragma unroll
        for (int u = 0; u < SPANS; u++)
            store_span(y, y_stride, span_of_matrix(first + u * THREADS, rows, cols, width), width, v[u]);
    });
}

template <typename To>
__device__ __forceinline__ void fill(To* y, i64 y_stride, float value, u32 rows, u32 cols) {
    for_spans<THREADS, SPANS>(aligned16(y, y_stride) && cols % 8 == 0, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        f32xn<N> v;
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] = value;
#pragma unroll
        for (int u = 0; u < SPANS; u++)
            store_span(y, y_stride, span_of_matrix(first + u * THREADS, rows, cols, width), width, v);
    });
}

#define COPY(NAME, TO, FROM)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME(TO* y, i32 y_stride, const FROM* x, i32 x_stride, i32 rows, i32 cols) {                                   \
        copy(y, y_stride, x, x_stride, rows, cols);                                                                    \
    }
#define FILL(NAME, TO)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(TO* y, i32 y_stride, float value, i32 rows, i32 cols) { \
        fill(y, y_stride, value, rows, cols);                                                                          \
    }

COPY(convert_f32_to_bf16, bf16, float)
COPY(convert_bf16_to_f32, float, bf16)
COPY(convert_bf16, bf16, bf16)
COPY(convert_f32, float, float)
FILL(convert_fill_bf16, bf16)
FILL(convert_fill_f32, float)
