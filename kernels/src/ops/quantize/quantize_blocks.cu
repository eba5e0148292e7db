// Types that need no search: dense ones, the blocks of 32, and 4-bit codes of bitsandbytes.

// Elements one by one. A thread rounds four neighbours.
template <typename Round>
__device__ __forceinline__ void quantize_dense(u16* packed, float* stored, const float* x, i64 count, Round round) {
    const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first + 4 > count) {
        for (i64 i = first; i < count; i++) {
            float back;
            packed[i] = round(x[i], back);
            if (stored) stored[i] = back;
        }
        return;
    }
    const float4 v = load4(x + first, is_aligned(x));
    float4 back;
    const u32 low = round(v.x, back.x) | (u32)round(v.y, back.y) << 16;
    const u32 high = round(v.z, back.z) | (u32)round(v.w, back.w) << 16;
    *reinterpret_cast<uint2*>(packed + first) = make_uint2(low, high);
    if (stored) store4(stored + first, back, is_aligned(stored));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_f16(u16* packed, float* stored, const float* x, i64 count) {
    quantize_dense(packed, stored, x, count, [](float x, float& back) {
        const u16 bits = to_f16(x);
        back = f16_to_f32(bits);
        return bits;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_bf16(u16* packed, float* stored, const float* x, i64 count) {
    quantize_dense(packed, stored, x, count, [](float x, float& back) {
        const bf16 rounded = to_bf16(x);
        back = to_f32(rounded);
        return rounded.bits;
    });
}

// ------------------------------------------------------------------------------------ blocks of 32
//
// Eight lanes share a block, four neighbouring elements each. Every type has a scale d, or d and a minimum m, both f16,
// and 4, 5 or 8 bits of every element.

constexpr int LANES = 8;

// 1 / d, or 0 for a block without spread.
__device__ __forceinline__ float inverse(float d) { return d == 0.0f ? 0.0f : quotient(1.0f, d); }

// A C cast to an 8-bit integer of 0 <= x < 2^22; 0 if not finite.
__device__ __forceinline__ u32 truncate_small(float x) {
    const float shifted = add(x, 8388608.0f);
    const bool rounded_up = sub(shifted, 8388608.0f) > x;
    return shifted == shifted ? (__float_as_uint(shifted) - rounded_up) & 255 : 0;
}

// To nearest, halves away from zero, as the low byte of an integer.
__device__ __forceinline__ u32 round_half_away(float x) {
    const float magnitude = fabsf(x), shifted = add(magnitude, 8388608.0f);
    const bool went_down = sub(magnitude, sub(shifted, 8388608.0f)) == 0.5f;
    const u32 rounded = __float_as_uint(shifted) + went_down;
    return (x < 0.0f ? 0 - rounded : rounded) & 255;
}

struct Four {
    float v[4];
};

// The element of largest magnitude in the block, with its sign; the first of several.
__device__ __forceinline__ float extreme(const Four& x, u32 lane) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(x.v[i]));
    largest = group_max<LANES>(largest);
    // Position, then sign.
    u32 first = 64;
#pragma unroll
    for (int i = 3; i >= 0; i--)
        if (fabsf(x.v[i]) == largest) first = (lane * 4 + i) * 2 + (x.v[i] < 0.0f);
    return group_min<LANES>(first) & 1 ? -largest : largest;
}

// The smallest element; of zeros the first, with its sign.
__device__ __forceinline__ float smallest(const Four& x, u32 lane) {
    const float least = -group_max<LANES>(-fminf(fminf(x.v[0], x.v[1]), fminf(x.v[2], x.v[3])));
    u32 first = 64;
#pragma unroll
    for (int i = 3; i >= 0; i--)
        if (x.v[i] == 0.0f) first = (lane * 4 + i) * 2 + (__float_as_uint(x.v[i]) >> 31);
    first = group_min<LANES>(first);
    return least != 0.0f ? least : first & 1 ? -0.0f : 0.0f;
}

__device__ __forceinline__ float greatest(const Four& x) {
    return group_max<LANES>(fmaxf(fmaxf(x.v[0], x.v[1]), fmaxf(x.v[2], x.v[3])));
}

// A type: bytes of a block, bits of an element, whether a minimum follows the scale. `fit` gives d, m and the codes,
// `value` what a code stands for.
struct Q8_0 {
    static constexpr int BYTES = 34, BITS = 8;
    static constexpr bool HAS_MIN = false;
    static __device__ __forceinline__ void fit(const Four& x, u32 lane, float& d, float&, u32 (&q)[4]) {
        d = quotient(fabsf(extreme(x, lane)), 127.0f);
        float by = inverse(d);
        if (isinf(by)) by = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) q[i] = round_half_away(mul(x.v[i], by));
    }
    static __device__ __forceinline__ float value(u32 q, float d, float) { return mul((float)(i8)q, d); }
};

template <int HALF> struct Symmetric {
    static constexpr bool HAS_MIN = false;
    static __device__ __forceinline__ void fit(const Four& x, u32 lane, float& d, float&, u32 (&q)[4]) {
        d = quotient(extreme(x, lane), -(float)HALF);
        const float by = inverse(d);
#pragma unroll
        for (int i = 0; i < 4; i++) q[i] = min(truncate_small(add(mul(x.v[i], by), HALF + 0.5f)), 2u * HALF - 1);
    }
    static __device__ __forceinline__ float value(u32 q, float d, float) { return mul((float)((i32)q - HALF), d); }
};

template <int MOST> struct Affine {
    static constexpr bool HAS_MIN = true;
    static __device__ __forceinline__ void fit(const Four& x, u32 lane, float& d, float& m, u32 (&q)[4]) {
        m = smallest(x, lane);
        const float spread = sub(greatest(x), m);
        // Zeros may differ in their sign, and then so does their difference.
        d = spread == 0.0f ? 0.0f : quotient(spread, (float)MOST);
        const float by = inverse(d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[i] = truncate_small(add(mul(sub(x.v[i], m), by), 0.5f));
            // The reference bounds 4 bits, and lets 5 bits wrap.
            if (MOST == 15) q[i] = min(q[i], 15u);
        }
    }
    static __device__ __forceinline__ float value(u32 q, float d, float m) { return add(mul((float)q, d), m); }
};

struct Q4_0 : Symmetric<8> {
    static constexpr int BYTES = 18, BITS = 4;
};
struct Q4_1 : Affine<15> {
    static constexpr int BYTES = 20, BITS = 4;
};
struct Q5_0 : Symmetric<16> {
    static constexpr int BYTES = 22, BITS = 5;
};
struct Q5_1 : Affine<31> {
    static constexpr int BYTES = 24, BITS = 5;
};

// Blocks start at even addresses only.
__device__ __forceinline__ void store_word(u8* p, u32 word) {
    u16* to = reinterpret_cast<u16*>(p);
    to[0] = (u16)word;
    to[1] = (u16)(word >> 16);
}

template <typename T>
__device__ __forceinline__ void quantize_block(u8* packed, float* stored, const float* x, i64 count) {
    const i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x, first = thread * 4;
    const u32 lane = threadIdx.x % LANES;
    // Lanes behind the end take part in the shuffles of their warp.
    const bool present = first < count;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (present) v = load4(x + first, is_aligned(x));
    const Four in = {{v.x, v.y, v.z, v.w}};
    float d, m = 0.0f;
    u32 q[4];
    T::fit(in, lane, d, m, q);
    u8* block = packed + thread / LANES * T::BYTES;
    constexpr int HEAD = T::HAS_MIN ? 4 : 2;
    const u16 d_bits = to_f16(d), m_bits = to_f16(m);
    u32 word = q[0] | q[1] << 8 | q[2] << 16 | q[3] << 24;
    if (T::BITS == 8) {
        if (present) store_word(block + HEAD + 4 * lane, word);
    } else {
        // Bit 4 of element i is bit i of a word of its own.
        const u32 fifth = q[0] >> 4 & 1 | q[1] >> 3 & 2 | q[2] >> 2 & 4 | q[3] >> 1 & 8;
        const u32 high = T::BITS == 5 ? group_or<LANES>(fifth << 4 * lane) : 0;
        word &= 0x0f0f0f0f;
        // Elements 16 to 31 are the upper nibbles.
        word |= __shfl_xor_sync(0xffffffffu, word, LANES / 2) << 4;
        constexpr int CODES = T::BITS == 5 ? HEAD + 4 : HEAD;
        if (present && lane < LANES / 2) store_word(block + CODES + 4 * lane, word);
        if (T::BITS == 5 && present && lane == 0) store_word(block + HEAD, high);
    }
    if (present && lane == 0) {
        reinterpret_cast<u16*>(block)[0] = d_bits;
        if (T::HAS_MIN) reinterpret_cast<u16*>(block)[1] = m_bits;
    }
    if (stored && present) {
        const float scale = f16_to_f32(d_bits), least = f16_to_f32(m_bits);
        // What is stored has as many bits as the type.
        constexpr u32 MASK = (1u << T::BITS) - 1;
        const float4 back = make_float4(T::value(q[0] & MASK, scale, least), T::value(q[1] & MASK, scale, least),
                                        T::value(q[2] & MASK, scale, least), T::value(q[3] & MASK, scale, least));
        store4(stored + first, back, is_aligned(stored));
    }
}

#define QUANTIZE(name, type)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) name(u8* packed, float* stored, const float* x, i64 count) { \
        quantize_block<type>(packed, stored, x, count);                                                               \
    }
QUANTIZE(quantize_q8_0, Q8_0)
QUANTIZE(quantize_q4_0, Q4_0)
QUANTIZE(quantize_q4_1, Q4_1)
QUANTIZE(quantize_q5_0, Q5_0)
QUANTIZE(quantize_q5_1, Q5_1)

// ------------------------------------------------------------------------------------ NF4 and FP4

// Codes and scales of whole blocks of consecutive elements, a warp per block, as bitsandbytes' CPU path has them:
// absmax = max |x|; the place of a code in the order of the values is the number of midpoints between neighbouring
// values below x * (1 / absmax). `order`: the code of every place, four bits each.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_four_bit(u8* codes, float* absmax, const float* x, const float* table, u64 order, i32 blocksize,
                      i64 blocks) {
    __shared__ float bounds[15];
    const u32 place = threadIdx.x;
    if (place < 15)
        bounds[place] = mul(add(table[order >> 4 * place & 15], table[order >> (4 * place + 4) & 15]), 0.5f);
    __syncthreads();
    const i32 lane = threadIdx.x % 32, pairs = blocksize / 2;
    const i64 warps = (i64)gridDim.x * (THREADS / 32);
    for (i64 block = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const float* in = x + block * blocksize;
        // The first pair of a lane, in blocks of 64 the only one, is read once: x may lie behind the bus.
        float2 pair = make_float2(0.0f, 0.0f);
        if (lane < pairs) pair = make_float2(in[2 * lane], in[2 * lane + 1]);
        float largest = fmaxf(fabsf(pair.x), fabsf(pair.y));
        for (i32 i = lane + 32; i < pairs; i += 32)
            largest = fmaxf(largest, fmaxf(fabsf(in[2 * i]), fabsf(in[2 * i + 1])));
        largest = warp_max(largest);
        if (lane == 0) absmax[block] = largest;
        const float by = quotient(1.0f, fmaxf(largest, 1e-38f));
        for (i32 i = lane; i < pairs; i += 32) {
            if (i != lane) pair = make_float2(in[2 * i], in[2 * i + 1]);
            const float first = mul(pair.x, by), second = mul(pair.y, by);
            u32 high = 0, low = 0;
#pragma unroll
            for (int k = 0; k < 15; k++) {
                high += first > bounds[k];
                low += second > bounds[k];
            }
            codes[block * pairs + i] = (u8)((order >> 4 * high & 15) << 4 | (order >> 4 * low & 15));
        }
    }
}

// stored = table[code] * scale, rounded to the type of the elements: 0 f32, 1 f16, 2 bf16, as in dequantize/frame.cuh. A
// thread makes two neighbours.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_four_bit_stored(float* stored, const u8* codes, const float* scales, const float* table, i32 rounding,
                             i32 block_shift, i64 pairs) {
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= pairs) return;
    const u32 code = codes[i];
    const float scale = scales[2 * i >> block_shift];
    float value[2] = {mul(table[code >> 4], scale), mul(table[code & 15], scale)};
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (rounding != 0) value[k] = rounding == 1 ? f16_to_f32(to_f16(value[k])) : to_f32(to_bf16(value[k]));
    stored[2 * i] = value[0];
    stored[2 * i + 1] = value[1];
}
