// What the decomposition and the split of a weight need beside matrix products: the random start and squared distances.

constexpr int THREADS = 256;

// The normal numbers of rng.rs at indices 0 .. count, rounded; a thread makes the four of a block.
extern "C" __global__ void __launch_bounds__(THREADS) svd_start(bf16* x, i64 count, u64 seed, u64 stream) {
    const i64 block = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (block * 4 >= count) return;
    const RandomWords words = philox((u64)block, stream, seed);
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        // In (0, 1], so that the logarithm is finite.
        const double u = ((double)words.w[2 * pair] + 1.0) / 4294967296.0;
        const double radius = sqrt(-2.0 * log(u));
        double sine, cosine;
        sincospi(2.0 * ((double)words.w[2 * pair + 1] / 4294967296.0), &sine, &cosine);
        const i64 i = block * 4 + 2 * pair;
        if (i < count) x[i] = to_bf16((float)(radius * cosine));
        if (i + 1 < count) x[i + 1] = to_bf16((float)(radius * sine));
    }
}

// partial[block] = the sum of the block's threads, always in the same order.
__device__ __forceinline__ void store_block_sum(double* partial, double sum) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// partial[block] = sum (x - y)^2 over the block's rows in f64; without y, of x^2.
extern "C" __global__ void __launch_bounds__(THREADS)
    svd_distance(double* partial, const float* x, const float* y, i32 stride, i32 rows, i32 cols) {
    double sum = 0.0;
    for (i32 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i64 start = (i64)row * stride;
        for (i32 col = threadIdx.x; col < cols; col += THREADS) {
            const float d = y ? x[start + col] - y[start + col] : x[start + col];
            sum += (double)d * (double)d;
        }
    }
    store_block_sum(partial, sum);
}
