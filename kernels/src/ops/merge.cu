// Rows of a merged weight get the lengths that were trained for them.

constexpr int THREADS = 256;

// w_n *= m_n / |w_n|, a block per row; the sum in f64 and always in the same order.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_row_lengths(float* w, i64 stride, const float* m, i32 cols) {
    __shared__ double sums[THREADS];
    float* row = w + (i64)blockIdx.x * stride;
    double sum = 0.0;
    for (i32 col = threadIdx.x; col < cols; col += THREADS) sum += (double)row[col] * (double)row[col];
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const double length = sqrt(sums[0]);
    const float factor = length == 0.0 ? 0.0f : (float)((double)m[blockIdx.x] / length);
    for (i32 col = threadIdx.x; col < cols; col += THREADS) row[col] *= factor;
}
