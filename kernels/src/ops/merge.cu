// An adapter's product is added to the dense rows of its weight, and the rows get the lengths that were trained for them.

constexpr int THREADS = 256;
// Rows that a thread has its column of, so that a is read once for all of them.
constexpr int ROWS = 8;

// w += scaling b a, every term rounded as it is added, in the order of the host: the same bits. Block (x, y): columns
// 256 y .. + 256 of rows 8 x .. + 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_low_rank(float* w, i64 w_stride, const float* b, i64 b_stride, const float* a, i64 a_stride, float scaling,
                   i32 rows, i32 cols, i32 rank) {
    const i32 col = blockIdx.y * THREADS + threadIdx.x, first = blockIdx.x * ROWS;
    if (col >= cols) return;
    float sum[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) sum[i] = first + i < rows ? w[(first + i) * w_stride + col] : 0.0f;
    for (i32 r = 0; r < rank; r++) {
        const float x = a[r * a_stride + col];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const float factor = first + i < rows ? __fmul_rn(scaling, b[(first + i) * b_stride + r]) : 0.0f;
            sum[i] = __fadd_rn(sum[i], __fmul_rn(factor, x));
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (first + i < rows) w[(first + i) * w_stride + col] = sum[i];
}

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
