// bitsandbytes NF4 and FP4: blocks of 32 to 4096 elements run over the flat matrix and may cross its rows.
//
// Plane 0: the codes, two to a byte, the first of them in the high nibble; the rows of whole groups of eight. Plane 1: the
// scales of the blocks, f32, or 8-bit codes of them. Plane 2: the scales of the scales. Table: the sixteen values, then
// the 256 values of the codes of the scales.

// The element types that values are rounded to.
enum { TO_F32, TO_F16, TO_BF16 };

__device__ __forceinline__ float round_to_f16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return f16_to_f32(bits);
}

// The scale of a block as it is stored.
template <bool DOUBLE> struct Scale {
    float plain;

    static __device__ __forceinline__ Scale load(const Packed& p, u32 block) {
        return {neighbour<float>(p.plane[1] + 4 * (u64)block)};
    }

    __device__ __forceinline__ float absmax(const u32*, const Packed&) const { return plain; }
};

// map[code] * absmax2 + offset, rounded twice
template <> struct Scale<true> {
    float absmax2;
    u8 code;

    static __device__ __forceinline__ Scale load(const Packed& p, u32 block) {
        return {neighbour<float>(p.plane[2] + 4 * (u64)(block >> p.nested_shift)), neighbour<u8>(p.plane[1] + block)};
    }

    __device__ __forceinline__ float absmax(const u32* table, const Packed& p) const {
        return __fadd_rn(__fmul_rn(__uint_as_float(table[16 + code]), absmax2), p.offset);
    }
};

// RAGGED: the columns are not a multiple of eight, so that a group may lie in two blocks.
template <bool DOUBLE, bool RAGGED> struct FourBit : Decoder<RAGGED ? 2 : 4, DOUBLE ? 16 + 256 : 16> {
    struct Raw {
        u32 codes;
        Scale<DOUBLE> scale[RAGGED ? 2 : 1];
    };

    static __device__ __forceinline__ u64 first_element(const Packed& p, u32 row, u32 group) {
        return (u64)row * p.cols + 8 * group;
    }

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        Raw raw;
        raw.codes = stream<u32>(p.plane[0] + 4 * (u64)i);
        if (RAGGED) {
            const u64 first = first_element(p, row, group), last = first + min(7u, p.cols - 8 * group - 1);
            raw.scale[0] = Scale<DOUBLE>::load(p, (u32)(first >> p.shift));
            raw.scale[RAGGED] = Scale<DOUBLE>::load(p, (u32)(last >> p.shift));
        } else {
            raw.scale[0] = Scale<DOUBLE>::load(p, i >> (p.shift - 3));
        }
        return raw;
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed& p, u32 row, u32 group) {
        const float absmax = raw.scale[0].absmax(table, p), next = raw.scale[RAGGED].absmax(table, p);
        const u32 size = 1u << p.shift, at = (u32)first_element(p, row, group) & (size - 1);
        f32x8 x;
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            const float value = __uint_as_float(table[raw.codes >> 4 * (j ^ 1) & 15]);
            x.v[j] = __fmul_rn(value, RAGGED && at + j >= size ? next : absmax);
        }
        return x;
    }

    static __device__ __forceinline__ void round(f32x8& x, const Packed& p, bool rounds_anyway) {
        if (p.rounding == TO_BF16 && !rounds_anyway) {
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const u32 pair = pack_bf16(x.v[j], x.v[j + 1]);
                x.v[j] = low_f32(pair);
                x.v[j + 1] = high_f32(pair);
            }
        } else if (p.rounding == TO_F16) {
#pragma unroll
            for (int j = 0; j < 8; j++) x.v[j] = round_to_f16(x.v[j]);
        }
    }
};

typedef FourBit<false, false> Plain;
typedef FourBit<false, true> PlainRagged;
typedef FourBit<true, false> Double;
typedef FourBit<true, true> DoubleRagged;

KERNELS(four_bit, Plain)
KERNELS(four_bit_ragged, PlainRagged)
KERNELS(four_bit_double, Double)
KERNELS(four_bit_double_ragged, DoubleRagged)
