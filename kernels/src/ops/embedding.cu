// Rows of a table by token. A dense table is converted on the way; of a packed one the rows' bytes are gathered, in
// token order, for the dequantize kernels.

constexpr int THREADS = 256;

struct f16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(f16 x) { return f16_to_f32(x.bits); }

__device__ __forceinline__ f32x8 load_span(const f16* p, i64 stride, Span s, Wide) {
    uint4 w = make_uint4(0, 0, 0, 0);
    if (s.present) w = *reinterpret_cast<const uint4*>(p + s.row * stride + s.col);
    return {{f16_to_f32((u16)w.x), f16_to_f32((u16)(w.x >> 16)), f16_to_f32((u16)w.y), f16_to_f32((u16)(w.y >> 16)),
             f16_to_f32((u16)w.z), f16_to_f32((u16)(w.z >> 16)), f16_to_f32((u16)w.w), f16_to_f32((u16)(w.w >> 16))}};
}

template <typename T>
__device__ __forceinline__ void look_up(bf16* y, i64 y_stride, const T* table, i64 table_stride, const u32* tokens,
                                        u32 rows, u32 cols) {
    const bool wide = aligned16(y, y_stride) && aligned16(table, table_stride) && cols % 8 == 0;
    for_spans<THREADS, 1>(wide, [&](auto width, u32 first) {
        const Span to = span_of_matrix(first, rows, cols, width);
        const Span from = {to.present ? tokens[to.row] : 0, to.col, to.present};
        store_span(y, y_stride, to, width, load_span(table, table_stride, from, width));
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward_bf16(bf16* y, i32 y_stride, const bf16* table, i32 table_stride, const u32* tokens, i32 rows,
                           i32 cols) {
    look_up(y, y_stride, table, table_stride, tokens, rows, cols);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward_f16(bf16* y, i32 y_stride, const f16* table, i32 table_stride, const u32* tokens, i32 rows,
                          i32 cols) {
    look_up(y, y_stride, table, table_stride, tokens, rows, cols);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward_f32(bf16* y, i32 y_stride, const float* table, i32 table_stride, const u32* tokens, i32 rows,
                          i32 cols) {
    look_up(y, y_stride, table, table_stride, tokens, rows, cols);
}

// y[i] = table[tokens[i]] in bytes: rows of `row_bytes`, without gaps. A thread copies sixteen bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_gather_bytes(u8* y, const u8* table, const u32* tokens, i32 rows, i32 row_bytes) {
    const u32 per_row = ((u32)row_bytes + 15) / 16;
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const u32 row = i / per_row, start = (i - row * per_row) * 16;
    if (row >= (u32)rows) return;
    u8* to = y + (i64)row * row_bytes + start;
    const u8* from = table + (i64)tokens[row] * row_bytes + start;
    if (aligned16(y, row_bytes) && aligned16(table, row_bytes)) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
        const u32 n = min((u32)row_bytes - start, 16u);
        for (u32 k = 0; k < n; k++) to[k] = from[k];
    }
}
