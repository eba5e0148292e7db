// What decoders of all packed types have in common, and what they are given.
//
// A group is eight neighbouring elements of a row, 16 bytes of bf16. A decoder is a struct: `Raw` is what it reads for a
// group, `load` reads it, `decode` makes eight f32 of it. The bytes of a weight come in planes, which weight/device.rs
// lays out; every field of a plane that `load` reads at once is aligned to its size. At the end of a file of decoders
// stands KERNELS(name, decoder) for each type, which is defined before it by whoever decodes.
//
// Where the CPU codec rounds after each operation, so do decoders: products and sums are written with __fmul_rn and
// __fadd_rn, which the compiler never fuses, except where a product is exact and fusing changes nothing.

// Planes and numbers of a packed weight.
struct Packed {
    const u8* plane[4];
    const u8* table;   // what the codes stand for; copied to shared memory
    float offset;      // 4-bit, double quantization: mean of the scales
    i32 shift;         // 4-bit: log2 of the block size
    i32 nested_shift;  // 4-bit, double quantization: log2 of the blocks that share a scale
    i32 rounding;      // 4-bit: the type that elements are rounded to first
    u32 cols;
    u32 groups;        // of a row; the last may be partly beyond it
};

// What the values of a row are multiplied by.
struct Scaling {
    float factor;      // of the whole weight
    const float* row;  // g, or null
};

// Bytes that are read once.
template <typename T> __device__ __forceinline__ T stream(const u8* p) { return __ldcs(reinterpret_cast<const T*>(p)); }

// Bytes that neighbours read too.
template <typename T> __device__ __forceinline__ T neighbour(const u8* p) { return __ldg(reinterpret_cast<const T*>(p)); }

// Eight codes of up to eight bits, a byte each: those of the even elements, and those of the odd.
struct Codes {
    u32 even, odd;
};

// Eight codes of four bits in the order of their elements.
__device__ __forceinline__ Codes nibbles(u32 x) { return {x & 0x0f0f0f0fu, x >> 4 & 0x0f0f0f0fu}; }

// Eight codes of two bits.
__device__ __forceinline__ Codes crumbs(u32 x) {
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    return {x & 0x03030303u, x >> 2 & 0x03030303u};
}

// Eight codes of one bit.
__device__ __forceinline__ Codes bits(u32 x) {
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    return {x & 0x01010101u, x >> 1 & 0x01010101u};
}

// Codes of which `high` holds the bits from bit `at` on.
__device__ __forceinline__ Codes join(Codes low, Codes high, int at) {
    return {low.even | high.even << at, low.odd | high.odd << at};
}

// Byte j of x as f32, less `zero`: the byte becomes the mantissa of 2^23 + byte, which is exact, and so is the difference.
__device__ __forceinline__ float byte_value(u32 x, u32 j, float zero) {
    return __fsub_rn(__uint_as_float(__byte_perm(x, 0x4b000000u, 0x7540u | j)), 8388608.0f + zero);
}

__device__ __forceinline__ f32x8 values(Codes codes, float zero) {
    f32x8 x;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        x.v[2 * j] = byte_value(codes.even, j, zero);
        x.v[2 * j + 1] = byte_value(codes.odd, j, zero);
    }
    return x;
}

// Eight bytes in two's complement.
__device__ __forceinline__ f32x8 signed_bytes(uint2 x) {
    f32x8 y;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        y.v[j] = byte_value(x.x ^ 0x80808080u, j, 128.0f);
        y.v[j + 4] = byte_value(x.y ^ 0x80808080u, j, 128.0f);
    }
    return y;
}

__device__ __forceinline__ f32x8 times(f32x8 x, float by) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fmul_rn(x.v[j], by);
    return x;
}

__device__ __forceinline__ f32x8 plus(f32x8 x, float by) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fadd_rn(x.v[j], by);
    return x;
}

// scale * x - min. The products of the K-quants have at most 22 bits and are exact, so fusing changes no bit.
__device__ __forceinline__ f32x8 affine(f32x8 x, float scale, float min) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fmaf_rn(scale, x.v[j], -min);
    return x;
}

template <class D> __device__ __forceinline__ void fill(u32* table, const Packed& p) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < D::TABLE; i += blockDim.x) table[i] = reinterpret_cast<const u32*>(p.table)[i];
    __syncthreads();
}

// What a thread reads for a group.
template <class D> struct Loaded {
    typename D::Raw raw;
    float gain;  // the row's g
};

template <class D>
__device__ __forceinline__ Loaded<D> load(const Packed& p, const Scaling& scaling, u32 row, u32 group) {
    return {D::load(p, row, group), scaling.row == nullptr ? 1.0f : __ldg(scaling.row + row)};
}

// Whether values are more than what was decoded.
template <class D> __device__ __forceinline__ bool is_finished(const Packed& p, const Scaling& scaling, bool rounds_anyway) {
    const bool scaled = scaling.factor != 1.0f || scaling.row != nullptr;
    return !scaled && !D::rounds(p, rounds_anyway);
}

// What was decoded as the value. `rounds_anyway`: the values end as bf16, so that rounding to it is left to the end where
// nothing comes between.
template <class D>
__device__ __forceinline__ void finish(f32x8& x, float gain, const Packed& p, const Scaling& scaling, bool rounds_anyway) {
    const bool scaled = scaling.factor != 1.0f || scaling.row != nullptr;
    D::round(x, p, rounds_anyway && !scaled);
    // One of the two may be 1, which changes no bit.
    if (scaled) x = times(times(x, scaling.factor), gain);
}

template <class D>
__device__ __forceinline__ f32x8 value(const Loaded<D>& loaded, const u32* table, const Packed& p,
                                       const Scaling& scaling, u32 row, u32 group, bool rounds_anyway) {
    f32x8 x = D::decode(loaded.raw, table, p, row, group);
    finish<D>(x, loaded.gain, p, scaling, rounds_anyway);
    return x;
}

// Most types have no rounding of their own and no table.
template <int LOADS, int TABLE_WORDS = 0> struct Decoder {
    static constexpr int IN_FLIGHT = LOADS;
    static constexpr u32 TABLE = TABLE_WORDS;

    static __device__ __forceinline__ bool rounds(const Packed&, bool) { return false; }

    static __device__ __forceinline__ void round(f32x8&, const Packed&, bool) {}
};

#define PACKED_PARAMETERS                                                                                          \
    const u8 *plane0, const u8 *plane1, const u8 *plane2, const u8 *plane3, const u8 *table, float offset, i32 shift, \
        i32 nested_shift, i32 rounding, i32 cols
#define PACKED                                                                                             \
    {                                                                                                      \
        {plane0, plane1, plane2, plane3}, table, offset, shift, nested_shift, rounding, (u32)cols, ((u32)cols + 7) / 8 \
    }
