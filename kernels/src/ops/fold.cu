// Small matrices once per optimizer step.

constexpr int THREADS = 256;

// g = m / n, 0 where n is 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    fold_row_factor(float* g, const float* m, const float* n, i32 count) {
    const i32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) g[i] = n[i] == 0.0f ? 0.0f : m[i] / n[i];
}

// folded = scaling diag(g) b, g = 1 where it is null; the same to `twin` unless that is null.
template <typename T>
__device__ __forceinline__ void fold(T* folded, i64 folded_stride, T* twin, i64 twin_stride, const float* b,
                                     i64 b_stride, const float* g, float scaling, u32 rows, u32 cols) {
    const bool wide = aligned16(b, b_stride) && aligned16(folded, folded_stride) && aligned16(twin, twin_stride) &&
                      cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        const Span s = span_of_matrix(first, rows, cols, width);
        auto v = load_span(b, b_stride, s, width);
        const float factor = g && s.present ? scaling * g[s.row] : scaling;
#pragma unroll
        for (int i = 0; i < N; i++) v.v[i] *= factor;
        store_span(folded, folded_stride, s, width, v);
        if (twin) store_span(twin, twin_stride, s, width, v);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold_branch_bf16(bf16* folded, i32 folded_stride, bf16* twin, i32 twin_stride, const float* b, i32 b_stride,
                     const float* g, float scaling, i32 rows, i32 cols) {
    fold(folded, folded_stride, twin, twin_stride, b, b_stride, g, scaling, rows, cols);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold_branch_f32(float* folded, i32 folded_stride, float* twin, i32 twin_stride, const float* b, i32 b_stride,
                    const float* g, float scaling, i32 rows, i32 cols) {
    fold(folded, folded_stride, twin, twin_stride, b, b_stride, g, scaling, rows, cols);
}
