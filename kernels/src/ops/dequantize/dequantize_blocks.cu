// Blocks with a scale, or a scale and a minimum: the 32-element types, the K-quants, the ternary types.
//
// Codes lie in the order of the elements: four bits of element j at bit 4j of the u32 of its group, two bits at bit 2j of
// its u16, one bit at bit j of its byte. A fifth or third bit, or a fifth and sixth, has a plane of its own.

// d * (code - zero) for codes of four bits, or five with HIGH, in blocks of 32; with MIN d * code + m.
// Planes: codes, scales (f16 d, or d and m), high bits.
template <bool HIGH, bool MIN> struct Block32 : Decoder<4> {
    struct Raw {
        u32 codes, scales;
        u8 high;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        Raw raw;
        raw.codes = stream<u32>(p.plane[0] + 4 * (u64)i);
        raw.scales = MIN ? neighbour<u32>(p.plane[1] + i / 4 * 4) : neighbour<u16>(p.plane[1] + i / 4 * 2);
        raw.high = HIGH ? stream<u8>(p.plane[2] + i) : 0;
        return raw;
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        Codes codes = nibbles(raw.codes);
        if (HIGH) codes = join(codes, bits(raw.high), 4);
        f32x8 x = times(values(codes, MIN ? 0.0f : HIGH ? 16.0f : 8.0f), f16_to_f32((u16)raw.scales));
        if (MIN) x = plus(x, f16_to_f32((u16)(raw.scales >> 16)));
        return x;
    }
};

// d * code, codes in two's complement, in blocks of 32 with an f16 d, or of 256 with an f32 d.
template <bool SUPER> struct Block8 : Decoder<4> {
    struct Raw {
        uint2 codes;
        u32 d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        const u32 d = SUPER ? neighbour<u32>(p.plane[1] + i / 32 * 4) : neighbour<u16>(p.plane[1] + i / 4 * 2);
        return {stream<uint2>(p.plane[0] + 8 * (u64)i), d};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        return times(signed_bytes(raw.codes), SUPER ? __uint_as_float(raw.d) : f16_to_f32((u16)raw.d));
    }
};

// d or -d by a bit, in blocks of 128.
struct Q1_0 : Decoder<4> {
    struct Raw {
        u16 d;
        u8 codes;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {neighbour<u16>(p.plane[1] + i / 16 * 2), stream<u8>(p.plane[0] + i)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        const u32 d = __float_as_uint(f16_to_f32(raw.d)), negative = ~(u32)raw.codes;
        f32x8 x;
#pragma unroll
        for (int j = 0; j < 8; j++) x.v[j] = __uint_as_float(d ^ (negative << (31 - j) & 0x80000000u));
        return x;
    }
};

// d * (code - 1) for codes of two bits, in blocks of 8 << SHIFT elements.
template <int SHIFT> struct Ternary : Decoder<4> {
    struct Raw {
        u16 codes, d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u16>(p.plane[0] + 2 * (u64)i), neighbour<u16>(p.plane[1] + (i >> SHIFT) * 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        return times(values(crumbs(raw.codes), 1.0f), f16_to_f32(raw.d));
    }
};

// d * (digit - 1), five digits to base 3 in a byte as TQ1_0 has them: the digit comes to the front by a power of 3.
// Planes: the 48 bytes of elements 0..240, d, the 4 bytes of the rest.
struct TQ1_0 : Decoder<2> {
    struct Raw {
        uint2 bytes;
        u16 d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group, block = i / 32, k = i % 32;
        const u8* bytes = p.plane[0] + 48 * (u64)block;
        uint2 eight;
        if (k < 20) {
            eight = neighbour<uint2>(bytes + 8 * (k % 4));
        } else if (k < 30) {
            eight = neighbour<uint2>(bytes + 32 + 8 * (k % 2));
        } else {
            eight.x = eight.y = neighbour<u32>(p.plane[2] + 4 * block);
        }
        return {eight, neighbour<u16>(p.plane[1] + 2 * block)};
    }

    static __device__ __forceinline__ u32 power(u32 n) { return n == 0 ? 1 : n == 1 ? 3 : n == 2 ? 9 : n == 3 ? 27 : 81; }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32 group) {
        const u32 k = group % 32, n = k < 20 ? k / 4 : k < 30 ? (k - 20) / 2 : 2 * (k - 30);
        const u32 low = power(n), high = k < 30 ? low : power(n + 1);
        f32x8 x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x.v[j] = digit(raw.bytes.x >> 8 * j, low);
            x.v[j + 4] = digit(raw.bytes.y >> 8 * j, high);
        }
        return times(x, f16_to_f32(raw.d));
    }

    static __device__ __forceinline__ float digit(u32 byte, u32 power) {
        return (float)((i32)((byte * power & 255) * 3 >> 8) - 1);
    }
};

// (d * sc) * code - (dmin * m), codes of four bits, or five with HIGH, sub-blocks of 32.
// Planes: codes, the first 16 bytes of the block (f16 d and dmin, twelve bytes of six-bit sc and m), high bits.
template <bool HIGH> struct Affine : Decoder<4> {
    struct Raw {
        u32 codes;
        uint4 head;
        u8 high;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        Raw raw;
        raw.codes = stream<u32>(p.plane[0] + 4 * (u64)i);
        raw.head = neighbour<uint4>(p.plane[1] + i / 32 * (u64)16);
        raw.high = HIGH ? stream<u8>(p.plane[2] + i) : 0;
        return raw;
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32 group) {
        // Sub-blocks 0..4 have their six bits in the first two words, 4..8 four in the last and two atop the others'.
        const u32 sub = group / 4 % 8, shift = 8 * (sub % 4);
        const u32 a = raw.head.y >> shift, b = raw.head.z >> shift, c = raw.head.w >> shift;
        const u32 sc = sub < 4 ? a & 63 : (c & 15) | (a >> 2 & 48);
        const u32 m = sub < 4 ? b & 63 : (c >> 4 & 15) | (b >> 2 & 48);
        const float scale = __fmul_rn(f16_to_f32((u16)raw.head.x), byte_value(sc, 0, 0.0f));
        const float min = __fmul_rn(f16_to_f32((u16)(raw.head.x >> 16)), byte_value(m, 0, 0.0f));
        Codes codes = nibbles(raw.codes);
        if (HIGH) codes = join(codes, bits(raw.high), 4);
        return affine(values(codes, 0.0f), scale, min);
    }
};

// (d * sc) * code - (dmin * m), codes of two bits, sub-blocks of 16 with sc and m in the nibbles of a byte.
// Planes: codes, f16 d and dmin, scales.
struct Q2_K : Decoder<4> {
    struct Raw {
        u32 d;
        u16 codes;
        u8 scales;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {neighbour<u32>(p.plane[1] + i / 32 * 4), stream<u16>(p.plane[0] + 2 * (u64)i),
                neighbour<u8>(p.plane[2] + i / 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        const float scale = __fmul_rn(f16_to_f32((u16)raw.d), byte_value(raw.scales & 15u, 0, 0.0f));
        const float min = __fmul_rn(f16_to_f32((u16)(raw.d >> 16)), byte_value(raw.scales >> 4, 0, 0.0f));
        return affine(values(crumbs(raw.codes), 0.0f), scale, min);
    }
};

// (d * (sc - 32)) * (code - 4), codes of three bits, sub-blocks of 16 with a sc of six bits.
// Planes: low two bits, d, high bits, the twelve bytes of sc.
struct Q3_K : Decoder<4> {
    struct Raw {
        u16 codes, d;
        u8 high, low_scale, high_scale;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group, block = i / 32, sub = i / 2 % 16;
        const u8* scales = p.plane[3] + 12 * (u64)block;
        return {stream<u16>(p.plane[0] + 2 * (u64)i), neighbour<u16>(p.plane[1] + 2 * block),
                stream<u8>(p.plane[2] + i), neighbour<u8>(scales + sub % 8), neighbour<u8>(scales + 8 + sub % 4)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32 group) {
        const u32 sub = group / 2 % 16;
        const u32 low = (u32)raw.low_scale >> 4 * (sub / 8) & 15, high = (u32)raw.high_scale >> 2 * (sub / 4) & 3;
        const float scale = __fmul_rn(f16_to_f32(raw.d), byte_value(low | high << 4, 0, 32.0f));
        return times(values(join(crumbs(raw.codes), bits(raw.high), 2), 4.0f), scale);
    }
};

// (d * sc) * (code - 32), codes of six bits, sub-blocks of 16 with an i8 sc.
// Planes: low four bits, d, high two bits, sc.
struct Q6_K : Decoder<4> {
    struct Raw {
        u32 codes;
        u16 high, d;
        i8 sc;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u32>(p.plane[0] + 4 * (u64)i), stream<u16>(p.plane[2] + 2 * (u64)i),
                neighbour<u16>(p.plane[1] + i / 32 * 2), neighbour<i8>(p.plane[3] + i / 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        const float scale = __fmul_rn(f16_to_f32(raw.d), (float)raw.sc);
        return times(values(join(nibbles(raw.codes), crumbs(raw.high), 4), 32.0f), scale);
    }
};

typedef Block32<false, false> Q4_0;
typedef Block32<false, true> Q4_1;
typedef Block32<true, false> Q5_0;
typedef Block32<true, true> Q5_1;

KERNELS(q4_0, Q4_0)
KERNELS(q4_1, Q4_1)
KERNELS(q5_0, Q5_0)
KERNELS(q5_1, Q5_1)
KERNELS(q8_0, Block8<false>)
KERNELS(q8_k, Block8<true>)
KERNELS(q1_0, Q1_0)
KERNELS(q2_0, Ternary<3>)
KERNELS(tq2_0, Ternary<5>)
KERNELS(tq1_0, TQ1_0)
KERNELS(q2_k, Q2_K)
KERNELS(q3_k, Q3_K)
KERNELS(q4_k, Affine<false>)
KERNELS(q5_k, Affine<true>)
KERNELS(q6_k, Q6_K)
