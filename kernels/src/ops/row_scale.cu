// The gradient of a factor per column: a sum over the tokens in two stages, so that it has the same bits every time.

constexpr int THREADS = 256;
// Rows that a warp of the backward pass has in flight.
constexpr int ROWS = 4;
// Partial sums that a thread has in flight.
constexpr int IN_FLIGHT = 16;

// The sums of columns col .. + 32 N over the rows of chunk blockIdx.y, a warp every eighth row.
template <typename Width>
__device__ __forceinline__ void sum_strip(float* partial, const bf16* dy, i64 dy_stride, const bf16* y, i64 y_stride,
                                          const bf16* to, i64 to_stride, u32 rows, u32 cols, u32 chunk, u32 col,
                                          Width width) {
    constexpr int N = Width::N;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 end = min(rows, (blockIdx.y + 1) * chunk);
    const bool inside = col + lane * N < cols;
    f32xn<N> sum = {};
    for (u32 row = blockIdx.y * chunk + warp; row < end; row += 8 * ROWS) {
        f32xn<N> a[ROWS], b[ROWS], c[ROWS] = {};
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            const Span s = {row + 8 * u, col + lane * N, inside && row + 8 * u < end};
            a[u] = load_span(dy, dy_stride, s, width);
            b[u] = load_span(y, y_stride, s, width);
            if (to) c[u] = load_span(to, to_stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
            for (int i = 0; i < N; i++) sum.v[i] += a[u].v[i] * (b[u].v[i] - c[u].v[i]);
    }
    store_column_sums(partial + (i64)blockIdx.y * cols, sum, col, cols);
}

// partial[y, n] = sum over the rows of chunk y of dy (y - to), `to` zeros where it is null. Block (x, y): columns
// 256 x .. + 256 of rows `chunk` y .. + chunk. partial: (gridDim.y, cols).
extern "C" __global__ void __launch_bounds__(THREADS)
    row_scale_backward_partial(float* partial, const bf16* dy, i32 dy_stride, const bf16* y, i32 y_stride,
                               const bf16* to, i32 to_stride, i32 rows, i32 cols, i32 chunk) {
    const u32 col = blockIdx.x * 256;
    if (aligned16(dy, dy_stride) && aligned16(y, y_stride) && aligned16(to, to_stride) && cols % 8 == 0) {
        sum_strip(partial, dy, dy_stride, y, y_stride, to, to_stride, rows, cols, chunk, col, Wide{});
        return;
    }
#pragma unroll 1
    for (u32 k = 0; k < 8; k++)
        sum_strip(partial, dy, dy_stride, y, y_stride, to, to_stride, rows, cols, chunk, col + 32 * k, Narrow{});
}

// partial[y, n] = sum over the rows of chunk y of dy (y - to), one row after another: the bits of
// rms_norm_backward_columns. Block (x, y): a span per thread from column 2048 x on. Rows are aligned.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_scale_backward_rows(float* partial, const bf16* dy, i32 dy_stride, const bf16* y, i32 y_stride, const bf16* to,
                            i32 to_stride, i32 rows, i32 cols, i32 chunk) {
    const Wide width;
    const u32 end = min(rows, (blockIdx.y + 1) * chunk), span = blockIdx.x * THREADS + threadIdx.x;
    f32x8 sum = {};
    for (u32 row = blockIdx.y * chunk; row < end; row += ROWS) {
        f32x8 a[ROWS], b[ROWS], c[ROWS];
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            Span s = span_of_row(row + u, span, cols, width);
            s.present &= row + u < end;
            a[u] = load_span(dy, dy_stride, s, width);
            b[u] = load_span(y, y_stride, s, width);
            c[u] = load_span(to, to_stride, s, width);
        }
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
            for (int i = 0; i < 8; i++) sum.v[i] = fmaf(a[u].v[i], b[u].v[i] - c[u].v[i], sum.v[i]);
    }
    const Span s = span_of_row(blockIdx.y, span, cols, width);
    if (!s.present) return;
#pragma unroll
    for (int i = 0; i < 8; i++) partial[(i64)s.row * cols + s.col + i] = sum.v[i];
}

// dscale += (sum of the chunks) / scale, nothing where scale is 0. A block adds up 32 columns, its eight warps every
// eighth chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_scale_backward_finish(float* dscale, const float* partial, const float* scale, i32 chunks, i32 cols) {
    __shared__ double sums[8][32];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 col = blockIdx.x * 32 + lane;
    double sum = 0.0;
    if (col < (u32)cols)
        for (u32 chunk = warp; chunk < (u32)chunks; chunk += 8 * IN_FLIGHT) {
            float x[IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                x[u] = chunk + 8 * u < (u32)chunks ? partial[(i64)(chunk + 8 * u) * cols + col] : 0.0f;
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) sum += (double)x[u];
        }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || col >= (u32)cols) return;
    for (int w = 1; w < 8; w++) sum += sums[w][lane];
    const float factor = scale[col];
    if (factor != 0.0f) dscale[col] += (float)(sum / (double)factor);
}
