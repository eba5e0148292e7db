// Two stages: a fixed number of blocks, each with a fixed share of the elements, and one block that adds them up. So
// the result depends neither on the device nor on the order in which blocks run. Sums are f64: squares of gradients
// leave the range of f32.

constexpr int THREADS = 256;
constexpr int BLOCKS = 512;
constexpr int SPANS = 2;

// The sum over the block, valid in thread 0.
__device__ __forceinline__ double sum_of_block(double x) {
    __shared__ double partial[THREADS];
    partial[threadIdx.x] = x;
    __syncthreads();
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    return partial[0];
}

template <typename Width>
__device__ __forceinline__ double sum_of_squares(const float* x, i64 stride, u32 rows, u32 cols, Width width) {
    constexpr int N = Width::N;
    const u32 items = rows * (cols / N);
    double sum = 0.0;
    for (u32 first = blockIdx.x * THREADS + threadIdx.x; first < items; first += BLOCKS * THREADS * SPANS) {
        f32xn<N> v[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++)
            v[u] = load_span(x, stride, span_of_matrix(first + u * BLOCKS * THREADS, rows, cols, width), width);
#pragma unroll
        for (int u = 0; u < SPANS; u++)
#pragma unroll
            for (int i = 0; i < N; i++) sum += (double)v[u].v[i] * (double)v[u].v[i];
    }
    return sum;
}

// partial[BLOCKS].
extern "C" __global__ void __launch_bounds__(THREADS)
    global_norm_partial(double* partial, const float* x, i32 stride, i32 rows, i32 cols) {
    double sum = aligned16(x, stride) && cols % 8 == 0 ? sum_of_squares(x, stride, rows, cols, Wide{})
                                                       : sum_of_squares(x, stride, rows, cols, Narrow{});
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// clip = (norm, min(1, max_norm / (norm + 1e-6)), 1 if the norm is not finite else 0). One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    global_norm_finish(float* clip, const double* partial, float max_norm) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < BLOCKS; i += THREADS) sum += partial[i];
    sum = sum_of_block(sum);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(sum);
    clip[0] = (float)norm;
    clip[1] = (float)fmin((double)max_norm / (norm + 1e-6), 1.0);
    clip[2] = isfinite(norm) ? 0.0f : 1.0f;
}
