// What all quantizers share: the rounding of the codecs on the CPU, bit by bit. Sums and products are written as calls
// that the compiler does not contract: the codecs round each, and a code may hang on the last bit.

constexpr int THREADS = 256;

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }

// To nearest, ties to even; too large becomes infinite.
__device__ __forceinline__ u16 to_f16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Four neighbouring elements; `wide`: they are aligned.
__device__ __forceinline__ float4 load4(const float* p, bool wide) {
    return wide ? *reinterpret_cast<const float4*>(p) : make_float4(p[0], p[1], p[2], p[3]);
}

__device__ __forceinline__ void store4(float* p, float4 x, bool wide) {
    if (wide) {
        *reinterpret_cast<float4*>(p) = x;
        return;
    }
    p[0] = x.x;
    p[1] = x.y;
    p[2] = x.z;
    p[3] = x.w;
}

__device__ __forceinline__ bool is_aligned(const void* p) { return ((u64)p & 15) == 0; }

// The reduction over groups of LANES neighbouring lanes, the same in all of them.
template <int LANES> __device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

template <int LANES> __device__ __forceinline__ u32 group_min(u32 x) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

template <int LANES> __device__ __forceinline__ u32 group_or(u32 x) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x |= __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
