// Codes that stand for the entries of a code book: 4-bit codes, and the points of the IQ types' lattices.
//
// The code book lies behind the planes of the weight and is copied to shared memory: sixteen f32 for codes of four bits,
// else eight or four signed bytes for each point.

__device__ __forceinline__ f32x8 look_up(u32 codes, const u32* table) {
    f32x8 x;
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __uint_as_float(table[codes >> 4 * j & 15]);
    return x;
}

// d * VALUES[code], in blocks of 32. Planes: codes, f16 d.
struct IQ4_NL : Decoder<4, 16> {
    struct Raw {
        u32 codes;
        u16 d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u32>(p.plane[0] + 4 * (u64)i), neighbour<u16>(p.plane[1] + i / 4 * 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32) {
        return times(look_up(raw.codes, table), f16_to_f32(raw.d));
    }
};

// d * (sc - 32) * VALUES[code], sub-blocks of 32.
// Planes: codes, the first eight bytes of the block (f16 d, the high bits of sc, their low bits).
struct IQ4_XS : Decoder<4, 16> {
    struct Raw {
        u32 codes;
        uint2 head;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u32>(p.plane[0] + 4 * (u64)i), neighbour<uint2>(p.plane[1] + i / 32 * (u64)8)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const u32 sub = group / 4 % 8;
        const u32 sc = (raw.head.y >> 4 * sub & 15) | (raw.head.x >> (16 + 2 * sub) & 3) << 4;
        const float scale = __fmul_rn(f16_to_f32((u16)raw.head.x), byte_value(sc, 0, 32.0f));
        return times(look_up(raw.codes, table), scale);
    }
};

// 2^(e - 128) * VALUES[code], in blocks of 32. Planes: codes, e.
struct MXFP4 : Decoder<4, 16> {
    struct Raw {
        u32 codes;
        u8 e;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u32>(p.plane[0] + 4 * (u64)i), neighbour<u8>(p.plane[1] + i / 4)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32) {
        const u32 e = raw.e;
        // The two smallest are subnormal.
        return times(look_up(raw.codes, table), __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23));
    }
};

// d * VALUES[code], sub-blocks of 16 with an unsigned E4M3 d, halved. Planes: codes, d.
struct NVFP4 : Decoder<4, 16> {
    struct Raw {
        u32 codes;
        u8 d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u32>(p.plane[0] + 4 * (u64)i), neighbour<u8>(p.plane[1] + i / 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32) {
        const u32 magnitude = raw.d & 127;
        const float subnormal = __fmul_rn((float)magnitude, 1.0f / 1024.0f);
        const float normal = __uint_as_float((magnitude << 20) + ((127 - 7 - 1) << 23));
        const float d = raw.d == 127 ? 0.0f : magnitude < 8 ? subnormal : normal;
        return times(look_up(raw.codes, table), d);
    }
};

// Signs of eight elements of which seven are stored: an even number is negative.
__device__ __forceinline__ u32 even_signs(u32 stored) { return stored | (__popc(stored) & 1) << 7; }

// Four signed bytes as f32 times `scale`, negative where a bit of `signs` is set.
__device__ __forceinline__ void four_points(float* x, u32 point, float scale, u32 signs) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const float value = __fmul_rn(scale, byte_value(point ^ 0x80808080u, j, 128.0f));
        x[j] = __uint_as_float(__float_as_uint(value) ^ (signs << (31 - j) & 0x80000000u));
    }
}

__device__ __forceinline__ f32x8 eight_points(uint2 points, float scale, u32 signs) {
    f32x8 x;
    four_points(x.v, points.x, scale, signs);
    four_points(x.v + 4, points.y, scale, signs >> 4);
    return x;
}

__device__ __forceinline__ uint2 point8(const u32* table, u32 point) {
    return reinterpret_cast<const uint2*>(table)[point];
}

// d * (0.5 + sc) * BY
__device__ __forceinline__ float lattice_scale(u16 d, u32 sc, float by) {
    return __fmul_rn(__fmul_rn(f16_to_f32(d), __fadd_rn(0.5f, (float)sc)), by);
}

// 256 points of eight. Planes: of each sub-block of 32 the four points, seven signs of each and the scale; d.
struct IQ2_XXS : Decoder<2, 2 * 256> {
    struct Raw {
        u32 signs;
        u16 d;
        u8 point;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        const u8* sub = p.plane[0] + i / 4 * (u64)8;
        return {neighbour<u32>(sub + 4), neighbour<u16>(p.plane[1] + i / 32 * 2), neighbour<u8>(sub + i % 4)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const float scale = lattice_scale(raw.d, raw.signs >> 28, 0.25f);
        return eight_points(point8(table, raw.point), scale, even_signs(raw.signs >> 7 * (group % 4) & 127));
    }
};

// 512 points of eight. Planes: of each group point and seven signs; d; scales of sub-blocks of 16.
struct IQ2_XS : Decoder<2, 2 * 512> {
    struct Raw {
        u16 point, d;
        u8 sc;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {stream<u16>(p.plane[0] + 2 * (u64)i), neighbour<u16>(p.plane[1] + i / 32 * 2),
                neighbour<u8>(p.plane[2] + i / 4)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const float scale = lattice_scale(raw.d, (u32)raw.sc >> 4 * (group / 2 % 2) & 15, 0.25f);
        return eight_points(point8(table, raw.point & 511), scale, even_signs(raw.point >> 9));
    }
};

// 1024 points of eight. Planes: of each block the low bytes of its points and their signs; d; of each block the high
// bits of the points and the scales of its sub-blocks of 16.
struct IQ2_S : Decoder<2, 2 * 1024> {
    struct Raw {
        u16 d;
        u8 point, signs, high, sc;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group, k = i % 32;
        const u8 *low = p.plane[0] + i / 32 * (u64)64, *head = p.plane[2] + i / 32 * (u64)16;
        return {neighbour<u16>(p.plane[1] + i / 32 * 2), neighbour<u8>(low + k), neighbour<u8>(low + 32 + k),
                neighbour<u8>(head + k / 4), neighbour<u8>(head + 8 + k / 4)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const float scale = lattice_scale(raw.d, (u32)raw.sc >> 4 * (group / 2 % 2) & 15, 0.25f);
        const u32 high = (u32)raw.high >> 2 * (group % 4) & 3;
        return eight_points(point8(table, raw.point | high << 8), scale, raw.signs);
    }
};

// 256 points of four. Planes: points; d; of each sub-block of 32 seven signs per group and the scale.
struct IQ3_XXS : Decoder<4, 256> {
    struct Raw {
        u32 signs;
        u16 points, d;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {neighbour<u32>(p.plane[2] + i / 4 * (u64)4), stream<u16>(p.plane[0] + 2 * (u64)i),
                neighbour<u16>(p.plane[1] + i / 32 * 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const float scale = lattice_scale(raw.d, raw.signs >> 28, 0.5f);
        const uint2 points = make_uint2(table[raw.points & 255], table[raw.points >> 8]);
        return eight_points(points, scale, even_signs(raw.signs >> 7 * (group % 4) & 127));
    }
};

// 512 points of four. Planes: low bytes of the points; d; of each block the high bits, the signs and the scales of
// sub-blocks of 32.
struct IQ3_S : Decoder<4, 512> {
    struct Raw {
        u16 points, d;
        u8 high, signs, sc;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group, k = i % 32;
        const u8* rest = p.plane[2] + i / 32 * (u64)44;
        return {stream<u16>(p.plane[0] + 2 * (u64)i), neighbour<u16>(p.plane[1] + i / 32 * 2),
                neighbour<u8>(rest + k / 4), neighbour<u8>(rest + 8 + k), neighbour<u8>(rest + 40 + k / 8)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const u32 sc = (u32)raw.sc >> 4 * (group / 4 % 2) & 15, high = (u32)raw.high >> 2 * (group % 4);
        const float scale = __fmul_rn(f16_to_f32(raw.d), (float)(1 + 2 * sc));
        const uint2 points =
            make_uint2(table[(raw.points & 255) | (high & 1) << 8], table[raw.points >> 8 | (high & 2) << 7]);
        return eight_points(points, scale, raw.signs);
    }
};

// scale * (point + shift)
__device__ __forceinline__ f32x8 shifted_points(uint2 points, float scale, bool down) {
    f32x8 x = signed_bytes(points);
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fmul_rn(scale, __fadd_rn(x.v[j], down ? -0.125f : 0.125f));
    return x;
}

// 2048 points of eight. Planes: low bytes of the points; d; of each sub-block of 32 the high bits, scale and shift.
struct IQ1_S : Decoder<4, 2 * 2048> {
    struct Raw {
        u16 high, d;
        u8 point;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {neighbour<u16>(p.plane[2] + i / 4 * (u64)2), neighbour<u16>(p.plane[1] + i / 32 * 2),
                stream<u8>(p.plane[0] + i)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const u32 high = raw.high, point = raw.point | (high >> 3 * (group % 4) & 7) << 8;
        const float scale = __fmul_rn(f16_to_f32(raw.d), (float)(2 * (high >> 12 & 7) + 1));
        return shifted_points(point8(table, point), scale, high >> 15 != 0);
    }
};

// 2048 points of eight. Planes: low bytes of the points; high bits and shift of a sub-block of 16; scales and d.
struct IQ1_M : Decoder<2, 2 * 2048> {
    struct Raw {
        uint2 scales;
        u8 point, high;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        const u32 i = row * p.groups + group;
        return {neighbour<uint2>(p.plane[2] + i / 32 * (u64)8), stream<u8>(p.plane[0] + i),
                neighbour<u8>(p.plane[1] + i / 2)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32* table, const Packed&, u32, u32 group) {
        const uint2 w = raw.scales;
        const u32 d = (w.x >> 12 & 15) | (w.x >> 28) << 4 | (w.y >> 12 & 15) << 8 | (w.y >> 28) << 12;
        const u32 sub = group / 2 % 16, word = (sub < 8 ? w.x : w.y) >> 16 * (sub / 4 % 2);
        const float scale = __fmul_rn(f16_to_f32((u16)d), (float)(2 * (word >> 3 * (sub % 4) & 7) + 1));
        const u32 high = (u32)raw.high >> 4 * (group % 2);
        return shifted_points(point8(table, raw.point | (high & 7) << 8), scale, (high & 8) != 0);
    }
};

KERNELS(iq4_nl, IQ4_NL)
KERNELS(iq4_xs, IQ4_XS)
KERNELS(mxfp4, MXFP4)
KERNELS(nvfp4, NVFP4)
KERNELS(iq2_xxs, IQ2_XXS)
KERNELS(iq2_xs, IQ2_XS)
KERNELS(iq2_s, IQ2_S)
KERNELS(iq3_xxs, IQ3_XXS)
KERNELS(iq3_s, IQ3_S)
KERNELS(iq1_s, IQ1_S)
KERNELS(iq1_m, IQ1_M)
