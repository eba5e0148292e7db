// A thread rotates neighbouring pairs of one head of one token: columns j .. of the lower half with those of the upper
// half. The table's row is shared by all heads of a token and stays in the cache. `factor`, where it is not null: what
// columns are multiplied by before they are rotated, or gradients after they are rotated back.
//
// `rope_backward_columns` also rotates the kept output back, in registers alone, and adds up its products with the
// gradient over the tokens: what the magnitudes of DoRA need, at one more reading of that output.

constexpr int THREADS = 256;
// Rows that a warp of the form `_columns` has in flight.
constexpr int ROWS = 2;

// direction: 1 forward, -1 backward.
template <int N>
__device__ __forceinline__ void turn(f32xn<N>& a, f32xn<N>& b, const f32xn<N>& cos, const f32xn<N>& sin,
                                     float direction) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float s = sin.v[i] * direction, lower = a.v[i];
        a.v[i] = lower * cos.v[i] - b.v[i] * s;
        b.v[i] = b.v[i] * cos.v[i] + lower * s;
    }
}

// Columns from `col` on by their factors, if there are any.
template <typename Width, int N>
__device__ __forceinline__ void multiply(f32xn<N>& x, const float* factor, u32 col, bool present, Width width) {
    if (factor == nullptr) return;
    const f32xn<N> f = load_span(factor, 0, Span{0, col, present}, width);
#pragma unroll
    for (int i = 0; i < N; i++) x.v[i] *= f.v[i];
}

__device__ __forceinline__ void rotate(bf16* x, i64 x_stride, const float* table, i64 table_stride,
                                       const u32* positions, const float* factor, u32 rows, u32 heads, u32 half,
                                       float direction) {
    const bool wide =
        aligned16(x, x_stride) && aligned16(table, table_stride) && aligned16(factor, 0) && half % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        // The matrix of all lower halves.
        const Span pairs = span_of_matrix(first, rows, heads * half, width);
        const u32 head = pairs.col / half, j = pairs.col - head * half;
        const Span lower = {pairs.row, head * 2 * half + j, pairs.present};
        const Span upper = {pairs.row, lower.col + half, pairs.present};
        const u32 position = pairs.present ? positions[pairs.row] : 0;
        auto a = load_span(x, x_stride, lower, width), b = load_span(x, x_stride, upper, width);
        const auto cos = load_span(table, table_stride, Span{position, j, pairs.present}, width);
        const auto sin = load_span(table, table_stride, Span{position, half + j, pairs.present}, width);
        multiply(a, factor, lower.col, lower.present, width);
        multiply(b, factor, upper.col, upper.present, width);
        turn(a, b, cos, sin, direction);
        store_span(x, x_stride, lower, width, a);
        store_span(x, x_stride, upper, width, b);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_forward(bf16* x, i32 x_stride, const float* table, i32 table_stride, const u32* positions,
                 const float* factor, i32 rows, i32 heads, i32 half) {
    rotate(x, x_stride, table, table_stride, positions, factor, rows, heads, half, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_backward(bf16* dx, i32 dx_stride, const float* table, i32 table_stride, const u32* positions,
                  const float*, i32 rows, i32 heads, i32 half) {
    rotate(dx, dx_stride, table, table_stride, positions, nullptr, rows, heads, half, -1.0f);
}

// Pairs pair .. + 32 N, counted over all heads, of the rows of chunk blockIdx.y, a warp every eighth row.
template <typename Width>
__device__ __forceinline__ void backward_strip(bf16* dx, i64 dx_stride, float* sums, const bf16* x, i64 x_stride,
                                               const float* table, i64 table_stride, const u32* positions,
                                               const float* factor, u32 rows, u32 heads, u32 half, u32 chunk,
                                               u32 pair, Width width) {
    constexpr int N = Width::N;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 end = min(rows, (blockIdx.y + 1) * chunk);
    const u32 pairs = heads * half, mine = pair + lane * N;
    // Columns of the lower half, as many as there are pairs before, and the upper halves of the heads before.
    const auto column = [half](u32 pair) { return pair + pair / half * half; };
    const bool inside = mine < pairs;
    const u32 lower = column(mine), upper = lower + half, j = mine % half;
    f32xn<N> lower_sum = {}, upper_sum = {};
    for (u32 row = blockIdx.y * chunk + warp; row < end; row += 8 * ROWS) {
        f32xn<N> da[ROWS], db[ROWS], a[ROWS], b[ROWS], cos[ROWS], sin[ROWS];
        u32 position[ROWS];
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            const u32 r = row + 8 * u;
            const bool present = inside && r < end;
            position[u] = present ? positions[r] : 0;
            da[u] = load_span(dx, dx_stride, Span{r, lower, present}, width);
            db[u] = load_span(dx, dx_stride, Span{r, upper, present}, width);
            a[u] = load_span(x, x_stride, Span{r, lower, present}, width);
            b[u] = load_span(x, x_stride, Span{r, upper, present}, width);
        }
        // Apart, for the table's rows wait for the positions, and nothing else should.
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            const bool present = inside && row + 8 * u < end;
            cos[u] = load_span(table, table_stride, Span{position[u], j, present}, width);
            sin[u] = load_span(table, table_stride, Span{position[u], half + j, present}, width);
        }
#pragma unroll
        for (int u = 0; u < ROWS; u++) {
            const u32 r = row + 8 * u;
            const bool present = inside && r < end;
            turn(da[u], db[u], cos[u], sin[u], -1.0f);
            turn(a[u], b[u], cos[u], sin[u], -1.0f);
#pragma unroll
            for (int i = 0; i < N; i++) {
                lower_sum.v[i] += da[u].v[i] * a[u].v[i];
                upper_sum.v[i] += db[u].v[i] * b[u].v[i];
            }
            multiply(da[u], factor, lower, present, width);
            multiply(db[u], factor, upper, present, width);
            store_span(dx, dx_stride, Span{r, lower, present}, width, da[u]);
            store_span(dx, dx_stride, Span{r, upper, present}, width, db[u]);
        }
    }
    sums += (i64)blockIdx.y * 2 * pairs;
    store_column_sums(sums, lower_sum, pair, pairs, column);
    store_column_sums(sums + half, upper_sum, pair, pairs, column);
}

// Block (x, y): pairs 256 x .. + 256 of rows `chunk` y .. + chunk. sums: (gridDim.y, heads * 2 half).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    rope_backward_columns(bf16* dx, i32 dx_stride, float* sums, const bf16* x, i32 x_stride, const float* table,
                          i32 table_stride, const u32* positions, const float* factor, i32 rows, i32 heads, i32 half,
                          i32 chunk) {
    const u32 pair = blockIdx.x * 256;
    const bool wide = aligned16(dx, dx_stride) && aligned16(x, x_stride) && aligned16(table, table_stride) &&
                      aligned16(factor, 0) && half % 8 == 0;
    if (wide) {
        backward_strip(dx, dx_stride, sums, x, x_stride, table, table_stride, positions, factor, rows, heads, half,
                       chunk, pair, Wide{});
        return;
    }
#pragma unroll 1
    for (u32 k = 0; k < 8; k++)
        backward_strip(dx, dx_stride, sums, x, x_stride, table, table_stride, positions, factor, rows, heads, half,
                       chunk, pair + 32 * k, Narrow{});
}
