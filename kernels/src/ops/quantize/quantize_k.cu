// The K-quants: superblocks of 256 elements whose sub-blocks are searched, one by a thread, so that its sums run in the
// order of the elements, as those of the codecs do.

// To nearest, halves to even, for |x| < 2^22; else what the low bits of x + 1.5 * 2^23 say, and 0 of a NaN, whose bits are
// others here than on the CPU.
__device__ __forceinline__ i32 nearest_int(float x) {
    const float shifted = add(x, 12582912.0f);
    return shifted == shifted ? (__float_as_int(shifted) & 0x7fffff) - 0x400000 : 0;
}

// nearest_int limited to 0 .. MOST, as a float. An infinity gives 0, and a NaN counts as one.
template <int MOST> __device__ __forceinline__ float level(float x) {
    const i32 bits = min(__float_as_int(add(x, 12582912.0f)), 0x7f800000);
    const i32 q = min(max((bits & 0x7fffff) - 0x400000, 0), MOST);
    // 2^23 + q, without the slow conversion.
    return __int_as_float(0x4b000000 | q) - 8388608.0f;
}

// ------------------------------------------------------------------------- x = (d * sc) * q - (dmin * m)

// Scales that are tried for a sub-block in turn: (FIRST + STEP * i + MOST) / (max - min), i = 0 .. LAST, with the best
// minimum so far.
struct Q4_K {
    static constexpr int MOST = 15, LAST = 20, BYTES = 144;
    static constexpr float FIRST = -1.0f, STEP = 0.1f;
};
struct Q5_K {
    static constexpr int MOST = 31, LAST = 15, BYTES = 176;
    static constexpr float FIRST = -0.5f, STEP = 0.1f;
};

// x = scale * q - min of a sub-block, with q = level(inverse * (x - offset)).
struct Fit {
    float scale, min, inverse, offset;
};

template <typename T> struct SubBlock {
    float x[32];
    // The weight of an error in x is rms + |x|.
    float rms;
    float q[32];

    __device__ __forceinline__ float weight(int l) const { return add(rms, fabsf(x[l])); }

    __device__ __forceinline__ float error(float scale, float min) const {
        float sum = 0.0f;
#pragma unroll
        for (int l = 0; l < 32; l++) {
            const float diff = sub(add(mul(scale, q[l]), min), x[l]);
            sum = add(sum, mul(weight(l), mul(diff, diff)));
        }
        return sum;
    }

    __device__ __forceinline__ Fit fit() {
        float squares = 0.0f;
#pragma unroll
        for (int l = 0; l < 32; l++) squares = add(squares, mul(x[l], x[l]));
        rms = __fsqrt_rn(quotient(squares, 32.0f));
        float least = x[0], most = x[0], sum_w = 0.0f, sum_x = 0.0f;
#pragma unroll
        for (int l = 0; l < 32; l++) {
            least = x[l] < least ? x[l] : least;
            most = x[l] > most ? x[l] : most;
            sum_w = add(sum_w, weight(l));
            sum_x = add(sum_x, mul(weight(l), x[l]));
        }
        if (least > 0.0f) least = 0.0f;
        Fit best;
        best.inverse = quotient((float)T::MOST, sub(most, least));
        best.scale = quotient(1.0f, best.inverse);
        best.min = best.offset = least;
#pragma unroll
        for (int l = 0; l < 32; l++) q[l] = level<T::MOST>(mul(best.inverse, sub(x[l], least)));
        float best_error = error(best.scale, best.min);
#pragma unroll 1
        for (int i = 0; i <= T::LAST; i++) {
            const float numerator = add(add(T::FIRST, mul(T::STEP, (float)i)), (float)T::MOST);
            const float candidate = quotient(numerator, sub(most, best.min));
            float sum_q = 0.0f, sum_qq = 0.0f, sum_qx = 0.0f;
#pragma unroll
            for (int l = 0; l < 32; l++) {
                q[l] = level<T::MOST>(mul(candidate, sub(x[l], best.min)));
                const float wq = mul(weight(l), q[l]);
                sum_q = add(sum_q, wq);
                sum_qq = add(sum_qq, mul(wq, q[l]));
                sum_qx = add(sum_qx, mul(wq, x[l]));
            }
            const float determinant = sub(mul(sum_w, sum_qq), mul(sum_q, sum_q));
            if (!(determinant > 0.0f)) continue;
            float scale = quotient(sub(mul(sum_w, sum_qx), mul(sum_x, sum_q)), determinant);
            float min = quotient(sub(mul(sum_qq, sum_x), mul(sum_q, sum_qx)), determinant);
            if (min > 0.0f) {
                scale = quotient(sum_qx, sum_qq);
                min = 0.0f;
            }
            const float this_error = error(scale, min);
            if (this_error < best_error) {
                best_error = this_error;
                best = {scale, min, candidate, best.min};
            }
        }
        if (most == least) best = {0.0f, least, 0.0f, 0.0f};
        best.min = -best.min;
        return best;
    }
};

// The multiple of largest / 63 nearest to x, with x of the eight sub-blocks; leaves that factor in `factor`. A negative
// x wraps.
__device__ __forceinline__ u32 multiple(float x, u16& factor) {
    const float largest = group_max<8>(fmaxf(0.0f, x));
    const float by = largest > 0.0f ? quotient(63.0f, largest) : 0.0f;
    factor = to_f16(quotient(largest, 63.0f));
    return min((u32)nearest_int(mul(by, x)) & 255, 63u);
}

// Eight lanes share a superblock.
template <typename T>
__device__ __forceinline__ void quantize_affine(u8* packed, float* stored, const float* x, i64 count) {
    const i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x, first = thread * 32;
    const u32 sub_block = threadIdx.x % 8;
    // Lanes behind the end take part in the shuffles of their warp.
    const bool present = first < count;
    SubBlock<T> s;
    const bool wide = is_aligned(x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (present) v = load4(x + first + 4 * i, wide);
        s.x[4 * i] = v.x;
        s.x[4 * i + 1] = v.y;
        s.x[4 * i + 2] = v.z;
        s.x[4 * i + 3] = v.w;
    }
    const Fit fit = s.fit();
    u16 d, dmin;
    const u32 sc = multiple(fit.scale, d), m = multiple(fit.min, dmin);

    // q again, for the scale and the minimum as they were rounded.
    const float scale = mul(f16_to_f32(d), (float)sc), least = mul(f16_to_f32(dmin), (float)m);
    // Multiplied by zero, the numbers of the fit stay.
    const float offset = scale == 0.0f ? -fit.offset : least;
#pragma unroll
    for (int l = 0; l < 32; l++) {
        const float shifted = add(s.x[l], offset);
        s.q[l] = level<T::MOST>(scale == 0.0f ? mul(fit.inverse, shifted) : quotient(shifted, scale));
    }
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        words[i] = (u32)s.q[4 * i] | (u32)s.q[4 * i + 1] << 8 | (u32)s.q[4 * i + 2] << 16 | (u32)s.q[4 * i + 3] << 24;
        if (stored && present) {
            float4 back;
            back.x = sub(mul(scale, s.q[4 * i]), least);
            back.y = sub(mul(scale, s.q[4 * i + 1]), least);
            back.z = sub(mul(scale, s.q[4 * i + 2]), least);
            back.w = sub(mul(scale, s.q[4 * i + 3]), least);
            store4(stored + first + 4 * i, back, is_aligned(stored));
        }
    }

    // Scales of 6 bits: the first four whole, the low bits of the others behind, their upper two bits above the first.
    const u32 sc_4 = __shfl_xor_sync(0xffffffffu, sc, 4), m_4 = __shfl_xor_sync(0xffffffffu, m, 4);
    const u32 at = 8 * (sub_block % 4);
    const u32 scales = group_or<4>((sc | sc_4 >> 4 << 6) << at);
    const u32 mins = group_or<4>((m | m_4 >> 4 << 6) << at);
    const u32 lows = group_or<4>((sc_4 & 15 | (m_4 & 15) << 4) << at);
    uint4* block = reinterpret_cast<uint4*>(packed + thread / 8 * T::BYTES);
    if (present && sub_block == 0) block[0] = make_uint4(d | (u32)dmin << 16, scales, mins, lows);

    if (T::MOST == 31) {
        u32 fifth[8];
#pragma unroll
        for (int i = 0; i < 8; i++) fifth[i] = group_or<8>((words[i] >> 4 & 0x01010101) << sub_block);
        if (present && sub_block == 0) block[1] = make_uint4(fifth[0], fifth[1], fifth[2], fifth[3]);
        if (present && sub_block == 1) block[2] = make_uint4(fifth[4], fifth[5], fifth[6], fifth[7]);
    }
    // Two neighbouring sub-blocks share 32 bytes, the second in the upper nibbles; each lane writes half of them.
    const bool upper = sub_block % 2 == 1;
    u32 codes[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 mine = words[i] & 0x0f0f0f0f, other = __shfl_xor_sync(0xffffffffu, mine, 1);
        codes[i] = upper ? other | mine << 4 : mine | other << 4;
    }
    const uint4 half = upper ? make_uint4(codes[4], codes[5], codes[6], codes[7])
                             : make_uint4(codes[0], codes[1], codes[2], codes[3]);
    if (present) block[T::BYTES / 16 - 8 + sub_block] = half;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_q4_k(u8* packed, float* stored, const float* x, i64 count) {
    quantize_affine<Q4_K>(packed, stored, x, count);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_q5_k(u8* packed, float* stored, const float* x, i64 count) {
    quantize_affine<Q5_K>(packed, stored, x, count);
}

// ------------------------------------------------------------------------- x = (d * sc) * (q - 32)

// Below this a group counts as all zero.
constexpr float ZERO_GROUP = 1e-15f;

struct Group {
    float x[16];

    // Weighted sums of q x and q q for q of this inverse scale; an error in x counts by x^2. |inverse * x| is at most 33,
    // so that no bits of q are lost, but in groups that count as zero, of which nothing is taken.
    __device__ __forceinline__ void trial(float inverse, float& sum_qx, float& sum_qq) const {
        sum_qx = sum_qq = 0.0f;
#pragma unroll
        for (int l = 0; l < 16; l++) {
            const float w = mul(x[l], x[l]), rounded = sub(add(mul(inverse, x[l]), 12582912.0f), 12582912.0f);
            const float q = fminf(fmaxf(rounded, -32.0f), 31.0f);
            sum_qx = add(sum_qx, mul(mul(w, x[l]), q));
            sum_qq = add(sum_qq, mul(mul(w, q), q));
        }
    }

    // -32 .. 31
    static __device__ __forceinline__ float level(float x) { return (float)min(max(nearest_int(x), -32), 31); }

    // The scale of the group; leaves q in its place.
    __device__ __forceinline__ float fit(float (&q)[16]) const {
        float extreme = 0.0f, largest = 0.0f;
#pragma unroll
        for (int l = 0; l < 16; l++) {
            const bool larger = fabsf(x[l]) > largest;
            largest = larger ? fabsf(x[l]) : largest;
            extreme = larger ? x[l] : extreme;
        }
        float inverse = quotient(-32.0f, extreme), sum_qx, sum_qq;
        trial(inverse, sum_qx, sum_qq);
        float scale = sum_qq == 0.0f ? 0.0f : quotient(sum_qx, sum_qq);
        float best = mul(scale, sum_qx);
#pragma unroll 1
        for (int i = -9; i <= 9; i++) {
            if (i == 0) continue;
            const float candidate = quotient(-add(32.0f, mul(0.1f, (float)i)), extreme);
            trial(candidate, sum_qx, sum_qq);
            if (sum_qq > 0.0f && mul(sum_qx, sum_qx) > mul(best, sum_qq)) {
                inverse = candidate;
                scale = quotient(sum_qx, sum_qq);
                best = mul(scale, sum_qx);
            }
        }
        const bool is_zero = largest < ZERO_GROUP;
#pragma unroll
        for (int l = 0; l < 16; l++) q[l] = is_zero ? -32.0f : level(mul(inverse, x[l]));
        return is_zero ? 0.0f : scale;
    }
};

// Sixteen lanes share a superblock. Element l of quarter t of a half has its low bits in byte 32 * (t % 2) + l of the
// half's 64, the low nibble for t < 2, and its high bits at bit 2 t of byte l of the half's 32.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_q6_k(u8* packed, float* stored, const float* x, i64 count) {
    __shared__ u32 codes[THREADS / 16][64];
    const i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x, first = thread * 16;
    const u32 lane = threadIdx.x % 16;
    const bool present = first < count;
    const bool wide = is_aligned(x);
    Group group;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (present) v = load4(x + first + 4 * i, wide);
        group.x[4 * i] = v.x;
        group.x[4 * i + 1] = v.y;
        group.x[4 * i + 2] = v.z;
        group.x[4 * i + 3] = v.w;
    }
    float q[16];
    const float fitted = group.fit(q);
    // The first scale of largest magnitude.
    const float largest = group_max<16>(fmaxf(0.0f, fabsf(fitted)));
    const u32 place = group_min<16>(fabsf(fitted) == largest ? lane : 16);
    const float extreme = __shfl_sync(0xffffffffu, fitted, place % 16, 16);
    const float inverse = quotient(-128.0f, extreme);
    const bool is_zero = largest < ZERO_GROUP;
    const u16 d = is_zero ? 0 : to_f16(quotient(1.0f, inverse));
    const i32 sc = is_zero ? 0 : (i8)min(nearest_int(mul(inverse, fitted)), 127);
    const float scale = mul(f16_to_f32(d), (float)sc);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 word = 0;
        float back[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            // Multiplied by zero, the numbers of the fit stay.
            const float level = scale == 0.0f ? q[4 * i + k] : Group::level(quotient(group.x[4 * i + k], scale));
            const i32 code = is_zero ? 0 : (i32)level + 32;
            word |= (u32)code << 8 * k;
            back[k] = mul(scale, (float)(code - 32));
        }
        codes[threadIdx.x / 16][4 * lane + i] = word;
        if (stored && present)
            store4(stored + first + 4 * i, make_float4(back[0], back[1], back[2], back[3]), is_aligned(stored));
    }
    __syncwarp();
    if (!present) return;
    // Superblocks start at even addresses only.
    u16* block = reinterpret_cast<u16*>(packed + thread / 16 * 210);
    const u32* c = codes[threadIdx.x / 16];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 half = i, part = lane / 8, l = lane % 8;
        const u32 low = c[32 * half + 8 * part + l], high = c[32 * half + 8 * (part + 2) + l];
        const u32 word = low & 0x0f0f0f0f | (high & 0x0f0f0f0f) << 4;
        block[2 * (16 * half + lane)] = (u16)word;
        block[2 * (16 * half + lane) + 1] = (u16)(word >> 16);
    }
    {
        const u32 half = lane / 8, l = lane % 8;
        u32 word = 0;
#pragma unroll
        for (int t = 0; t < 4; t++) word |= (c[32 * half + 8 * t + l] >> 4 & 0x03030303) << 2 * t;
        block[64 + 2 * lane] = (u16)word;
        block[64 + 2 * lane + 1] = (u16)(word >> 16);
    }
    reinterpret_cast<u8*>(block)[192 + lane] = (u8)sc;
    if (lane == 0) block[104] = d;
}
