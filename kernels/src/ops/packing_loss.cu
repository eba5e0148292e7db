// What packing takes from a change of a weight: four sums in f64.

constexpr int THREADS = 256;

// partial[block] = (sum after^2, sum (after - before)^2, sum (stored - before) (after - before), sum (stored - after)^2)
// over the block's rows; differences that stand for weights are rounded to f32.
extern "C" __global__ void __launch_bounds__(THREADS)
    packing_loss(double* partial, const float* before, i64 before_stride, const float* after, i64 after_stride,
                 const float* stored, i64 stored_stride, i32 rows, i32 cols) {
    __shared__ double sums[4][THREADS];
    double adapted = 0.0, change = 0.0, arrived = 0.0, noise = 0.0;
    for (i32 row = blockIdx.x; row < rows; row += gridDim.x) {
        for (i32 col = threadIdx.x; col < cols; col += THREADS) {
            const float w = before[row * before_stride + col], changed = after[row * after_stride + col];
            const float rest = stored[row * stored_stride + col];
            const double moved = (double)(changed - w), left = (double)rest - (double)changed;
            adapted += (double)changed * (double)changed;
            change += moved * moved;
            arrived += (double)(rest - w) * moved;
            noise += left * left;
        }
    }
    sums[0][threadIdx.x] = adapted;
    sums[1][threadIdx.x] = change;
    sums[2][threadIdx.x] = arrived;
    sums[3][threadIdx.x] = noise;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i][threadIdx.x] += sums[i][threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
        double* to = partial + 4 * (i64)blockIdx.x;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = sums[i][0];
    }
}
