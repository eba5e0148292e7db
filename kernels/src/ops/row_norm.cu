// The length of every row of W + s B A from |W|^2, W A^T and A A^T, once per optimizer step.

// Below this part of |W|^2 + s^2 |B A|^2 the factored square is not trusted.
constexpr double CANCELLATION = 1e-3;

// An element of an f32 or a bf16 matrix.
__device__ __forceinline__ float element(const void* p, i64 i, bool is_bf16) {
    return is_bf16 ? to_f32(((const bf16*)p)[i]) : ((const float*)p)[i];
}

constexpr int GRAM_THREADS = 128;
// Rows of a tile of A A^T.
constexpr int TILE = 4;

// gram = A A^T, (rank, rank). Block (x, y): the tile of rows TILE x and columns TILE y; a tile below the diagonal is
// the transpose of one above it and written there. A thread adds every 128th column in f32, the threads' sums are added
// in f64.
extern "C" __global__ void __launch_bounds__(GRAM_THREADS)
    row_norm_gram(float* gram, const void* a, i32 a_stride, i32 a_is_bf16, i32 rank, i32 cols) {
    if (blockIdx.y < blockIdx.x) return;
    __shared__ float sums[TILE * TILE][GRAM_THREADS + 1];
    __shared__ double groups[TILE * TILE][9];
    const u32 top = blockIdx.x * TILE, left = blockIdx.y * TILE;
    float acc[TILE][TILE] = {};
    for (u32 k = threadIdx.x; k < (u32)cols; k += GRAM_THREADS) {
        float p[TILE], q[TILE];
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            // A row past the last is a copy of the last, and not written.
            p[i] = element(a, (i64)min(top + i, (u32)rank - 1) * a_stride + k, a_is_bf16);
            q[i] = element(a, (i64)min(left + i, (u32)rank - 1) * a_stride + k, a_is_bf16);
        }
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
            for (int j = 0; j < TILE; j++) acc[i][j] += p[i] * q[j];
    }
#pragma unroll
    for (int i = 0; i < TILE; i++)
#pragma unroll
        for (int j = 0; j < TILE; j++) sums[i * TILE + j][threadIdx.x] = acc[i][j];
    __syncthreads();
    const u32 product = threadIdx.x / 8, group = threadIdx.x % 8;
    double sum = 0.0;
    for (int i = 0; i < GRAM_THREADS / 8; i++) sum += (double)sums[product][i * 8 + group];
    groups[product][group] = sum;
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < 8; i++) sum += groups[product][i];
    const u32 row = top + product / TILE, col = left + product % TILE;
    if (row < (u32)rank && col < (u32)rank) {
        gram[row * rank + col] = (float)sum;
        gram[col * rank + row] = (float)sum;
    }
}

__device__ __forceinline__ double warp_sum_f64(double x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

constexpr int THREADS = 256;

// norm = sqrt(|W|^2 + 2 s B . (W A^T) + s^2 B (A A^T) B^T), a warp per row; and, where `m` is given, what is folded with
// it: g = m / norm, 0 where the norm is 0, and folded_b = s diag(g) B. `g` may be `folded`. `wa` is A W^T, (rank, rows); `w` the rows
// of W themselves, which only rows that B A nearly cancels read: those are built and measured.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_norm_forward(float* norm, const float* w_squared, const void* wa, i32 wa_stride, i32 wa_is_bf16, const void* a,
                     i32 a_stride, i32 a_is_bf16, const void* b, i32 b_stride, i32 b_is_bf16, const float* gram,
                     i32 gram_stride, const void* w, i32 w_stride, i32 w_is_bf16, const float* folded, const float* m, float* g_out,
                     bf16* folded_b, i32 folded_b_stride, float scaling, i32 rows, i32 cols, i32 rank) {
    const u32 row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= (u32)rows) return;
    const i64 b_row = (i64)row * b_stride;
    // Rows that are multiplied by g already are divided by it; one of g = 0 tells nothing of W.
    const float g = folded == nullptr ? 1.0f : folded[row];
    const float per_g = g == 0.0f ? 0.0f : 1.0f / g;
    double cross = 0.0, low_rank = 0.0;
    for (u32 q = lane; q < (u32)rank; q += 32) {
        const float b_q = element(b, b_row + q, b_is_bf16);
        float product = 0.0f;
#pragma unroll 8
        for (u32 r = 0; r < (u32)rank; r++) product += gram[r * gram_stride + q] * element(b, b_row + r, b_is_bf16);
        low_rank += (double)product * b_q;
        cross += (double)(element(wa, (i64)q * wa_stride + row, wa_is_bf16) * per_g) * b_q;
    }
    const double s = scaling;
    low_rank = s * s * warp_sum_f64(low_rank);
    const double own = w_squared[row];
    double square = own + 2.0 * s * warp_sum_f64(cross) + low_rank;
    if (square < CANCELLATION * (own + low_rank) || square < 0.0) {
        square = 0.0;
        for (u32 k = lane; k < (u32)cols; k += 32) {
            double x = 0.0;
            for (u32 r = 0; r < (u32)rank; r++)
                x += (double)element(b, b_row + r, b_is_bf16) * element(a, (i64)r * a_stride + k, a_is_bf16);
            x = element(w, (i64)row * w_stride + k, w_is_bf16) * per_g + s * x;
            square += x * x;
        }
        square = warp_sum_f64(square);
    }
    const float length = (float)sqrt(square);
    if (lane == 0) norm[row] = length;
    if (m == nullptr) return;
    const float factor = length == 0.0f ? 0.0f : m[row] / length;
    if (lane == 0) g_out[row] = factor;
    for (u32 q = lane; q < (u32)rank; q += 32)
        folded_b[(i64)row * folded_b_stride + q] = to_bf16(scaling * factor * element(b, b_row + q, b_is_bf16));
}
