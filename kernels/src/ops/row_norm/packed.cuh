// Norms of rows of a packed weight by products, which read it once and make no bf16 of it in memory. What is here stands
// between the frame of the decoders and the decoders themselves; ROW_NORMS of one type comes behind them.

// A packed weight, and the rows of it that a lane reads, a group at a time. Values are those of `dequantize` to bf16, of
// weights whose elements are not rounded to f16 first: without branches the rows of a lane are decoded side by side.
template <class D> struct PackedRows {
    static constexpr bool DECODES = true;
    using Raw = typename D::Raw;
    const Packed& p;
    const u32* table;
    float factor;

    __device__ __forceinline__ f32x8 decode(const Raw& raw, u32 row, u32 group) const {
        return times(D::decode(raw, table, p, row, group), factor);
    }

    __device__ __forceinline__ float element(u32 row, u32 col) const {
        const f32x8 x = decode(D::load(p, row, col / 8), row, col / 8);
        float found = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 8; j++) found = col % 8 == j ? x.v[j] : found;
        return to_f32(to_bf16(found));
    }

    struct Lane {
        const PackedRows& w;
        // `last`: 8 times the number of groups of eight rows behind the first.
        u32 first, last, part;

        __device__ __forceinline__ Lane(const PackedRows& w, u32 rows, u32 row, u32 part)
            : w(w), first(min(row, rows - 1)), last((rows - 1 - first) / 8 * 8), part(part) {}

        __device__ __forceinline__ u32 row(u32 i) const { return first + min(8 * i, last); }

        __device__ __forceinline__ Raw load(u32 i, u32 col) const { return D::load(w.p, row(i), col / 8 + part); }

        __device__ __forceinline__ uint4 values(const Raw& raw, u32 i, u32 col) const {
            const f32x8 x = w.decode(raw, row(i), col / 8 + part);
            return make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]), pack_bf16(x.v[4], x.v[5]),
                              pack_bf16(x.v[6], x.v[7]));
        }

        __device__ __forceinline__ void keep_in_registers() const {}
    };
};

// Blocks of THREADS.
template <class D, u32 TILES, u32 DEPTH>
__device__ __forceinline__ void forward_packed(const Results& out, const float* w_squared, const Packed& p, float factor,
                                               const Factors& x, const float* m) {
    __shared__ u32 table[D::TABLE > 0 ? D::TABLE : 1];
    if (D::TABLE > 0) fill<D>(table, p);
    forward_products<TILES, DEPTH>(out, w_squared, PackedRows<D>{p, table, factor}, x, nullptr, m);
}

#define ROW_NORM(name, D, TILES, DEPTH)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
        name(float* norm, const float* w_squared, const bf16* a, i32 a_stride, const float* b, i32 b_stride,          \
             PACKED_PARAMETERS, float factor, const float* m, float* g, bf16* folded_b, i32 folded_b_stride,          \
             float scaling, i32 rows, i32 rank) {                                                                     \
        const Packed p = PACKED;                                                                                      \
        const Factors x = {b, a, (u32)b_stride, (u32)a_stride, (u32)rows, (u32)cols, (u32)rank};                      \
        const Results out = {norm, g, folded_b, folded_b_stride, scaling};                                            \
        forward_packed<D, TILES, DEPTH>(out, w_squared, p, factor, x, m);                                             \
    }

// The decoder of a type, by its name.
#undef KERNELS
#define KERNELS(name, D) \
    struct Decoder_##name : D {};

// The kernels of a type: blocks of 32 rows and of 16.
#define ROW_NORMS(name)                                        \
    ROW_NORM(row_norm_packed_32_##name, Decoder_##name, 4, 3) \
    ROW_NORM(row_norm_packed_16_##name, Decoder_##name, 2, 4)
