// One pass over parameters, gradients and both moments; the bf16 copy that the kernels compute with is written on the
// way.

constexpr int THREADS = 256;

// `clip`: what global_norm left on the device (norm, factor, 1 if the norm is not finite), or null. Gradients that are
// not finite change nothing, so that the host may find out later and still has the state before. `copy` may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_update(float* params, i32 params_stride, float* m, i32 m_stride, float* v, i32 v_stride, bf16* copy,
                 i32 copy_stride, const float* grads, i32 grads_stride, const float* clip, i32 rows, i32 cols,
                 float grad_scale, float keep, float blend, float beta2, float blend2, float correction2, float eps,
                 float step_size) {
    if (clip) {
        if (clip[2] != 0.0f) return;
        grad_scale *= clip[1];
    }
    const bool wide = aligned16(params, params_stride) && aligned16(m, m_stride) && aligned16(v, v_stride) &&
                      aligned16(grads, grads_stride) && (!copy || aligned16(copy, copy_stride)) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        constexpr int N = decltype(width)::N;
        const Span s = span_of_matrix(first, rows, cols, width);
        auto p8 = load_span(params, params_stride, s, width), m8 = load_span(m, m_stride, s, width);
        auto v8 = load_span(v, v_stride, s, width);
        const auto g8 = load_span(grads, grads_stride, s, width);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = g8.v[i] * grad_scale;
            const float kept = p8.v[i] * keep;
            m8.v[i] += blend * (g - m8.v[i]);
            v8.v[i] = v8.v[i] * beta2 + blend2 * g * g;
            p8.v[i] = kept - step_size * (m8.v[i] / (sqrtf(v8.v[i]) / correction2 + eps));
        }
        store_span(params, params_stride, s, width, p8);
        store_span(m, m_stride, s, width, m8);
        store_span(v, v_stride, s, width, v8);
        if (copy) store_span(copy, copy_stride, s, width, p8);
    });
}
