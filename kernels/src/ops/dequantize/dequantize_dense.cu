// Dense elements, one after another, and LLM.int8.
//
// Plane 0 holds the rows, each of whole groups of eight elements; plane 1 of LLM.int8 the scales of the rows.

// Eight elements of two, four or eight bytes.
template <typename T> struct Dense : Decoder<sizeof(T) == 8 ? 1 : 8 / sizeof(T)> {
    struct Raw {
        uint4 words[sizeof(T) / 2];
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        Raw raw;
        const u8* at = p.plane[0] + 8 * sizeof(T) * ((u64)row * p.groups + group);
#pragma unroll
        for (u32 i = 0; i < sizeof(T) / 2; i++) raw.words[i] = stream<uint4>(at + 16 * i);
        return raw;
    }

    // Word i of the group.
    static __device__ __forceinline__ u32 word(const Raw& raw, u32 i) {
        const uint4 w = raw.words[i / 4];
        return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
    }

    static __device__ __forceinline__ u16 half(const Raw& raw, u32 i) { return (u16)(word(raw, i / 2) >> 16 * (i % 2)); }

    static __device__ __forceinline__ u64 pair(const Raw& raw, u32 i) {
        return (u64)word(raw, 2 * i + 1) << 32 | word(raw, 2 * i);
    }
};

#define DENSE(Name, T, element)                                                                         \
    struct Name : Dense<T> {                                                                            \
        static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) { \
            f32x8 x;                                                                                    \
            _Pragma("unroll") for (u32 j = 0; j < 8; j++) x.v[j] = element;                             \
            return x;                                                                                   \
        }                                                                                               \
    };

DENSE(F32, u32, __uint_as_float(word(raw, j)))
DENSE(F16, u16, f16_to_f32(half(raw, j)))
DENSE(BF16, u16, to_f32(bf16{half(raw, j)}))
DENSE(F64, u64, __double2float_rn(__longlong_as_double((i64)pair(raw, j))))
DENSE(I16, u16, (float)(i16)half(raw, j))
DENSE(I32, u32, __int2float_rn((i32)word(raw, j)))
DENSE(I64, u64, __ll2float_rn((i64)pair(raw, j)))

struct I8 : Decoder<4> {
    typedef uint2 Raw;

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        return stream<uint2>(p.plane[0] + 8 * ((u64)row * p.groups + group));
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed&, u32, u32) {
        return signed_bytes(raw);
    }
};

// x = (q * SCB) * (1/127)
struct Int8 : Decoder<4> {
    struct Raw {
        uint2 codes;
        float scale;
    };

    static __device__ __forceinline__ Raw load(const Packed& p, u32 row, u32 group) {
        return {stream<uint2>(p.plane[0] + 8 * ((u64)row * p.groups + group)),
                neighbour<float>(p.plane[1] + 4 * (u64)row)};
    }

    static __device__ __forceinline__ f32x8 decode(const Raw& raw, const u32*, const Packed& p, u32, u32) {
        return times(times(signed_bytes(raw.codes), raw.scale), p.offset);
    }
};

KERNELS(f32, F32)
KERNELS(f16, F16)
KERNELS(bf16, BF16)
KERNELS(f64, F64)
KERNELS(i8, I8)
KERNELS(i16, I16)
KERNELS(i32, I32)
KERNELS(i64, I64)
KERNELS(int8, Int8)
