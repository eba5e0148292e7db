// db += scaling * diag(g) * product: the last step of a scaled branch's gradient.
//
// db (N, R) f32, rows `stride` apart; product (N, R) f32, contiguous; g (N) f32.
extern "C" __global__ void low_rank_add_scaled(float* db, const float* product, const float* g, float scaling,
                                               int rows, int cols, int stride) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    const int n = i / cols;
    db[(i64)n * stride + i % cols] += scaling * g[n] * product[i];
}
