// What every kernel file starts with: element types, conversions, 16-byte accesses, reductions.
//
// NVRTC ships no cuda_bf16.h, so the types live here and a user needs nothing but the driver and NVRTC.
// Matrices are row-major; a stride counts elements between the starts of two rows.

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// The upper half of an f32.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_f32(float x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

__device__ __forceinline__ float f16_to_f32(u16 bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Two bf16 in one word, `low` first in memory.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return to_bf16(x); }

// N neighbouring elements in registers.
template <int N> struct f32xn {
    float v[N];
};
using f32x8 = f32xn<8>;

__device__ __forceinline__ f32x8 unpack8(uint4 w) {
    return {{low_f32(w.x), high_f32(w.x), low_f32(w.y), high_f32(w.y), low_f32(w.z), high_f32(w.z), low_f32(w.w),
             high_f32(w.w)}};
}

// `p` is 16-byte aligned.
__device__ __forceinline__ f32x8 load8(const bf16* p) { return unpack8(*reinterpret_cast<const uint4*>(p)); }

__device__ __forceinline__ f32x8 load8(const float* p) {
    const float4 a = *reinterpret_cast<const float4*>(p);
    const float4 b = *reinterpret_cast<const float4*>(p + 4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ void store8(bf16* p, const f32x8& x) {
    *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]),
                                              pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
}

__device__ __forceinline__ void store8(float* p, const f32x8& x) {
    *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *reinterpret_cast<float4*>(p + 4) = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

// Whether rows that start at `p`, `stride` elements apart, can be read sixteen bytes at a time.
template <typename T> __device__ __forceinline__ bool aligned16(const T* p, i64 stride) {
    return ((u64)p & 15) == 0 && (stride * sizeof(T) & 15) == 0;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// Sum over a block of THREADS threads, the same bits in every thread; callable repeatedly.
template <int THREADS> __device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[THREADS / 32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) sum += partial[i];
    return sum;
}

template <int THREADS> __device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[THREADS / 32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float largest = partial[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) largest = fmaxf(largest, partial[i]);
    return largest;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// How the kernels that only move and combine elements see a matrix: as spans of neighbouring columns, eight where all
// rows are aligned and a multiple of eight columns long (`Wide`), one otherwise (`Narrow`). A type, so that the choice
// is made once per kernel: a branch at every load would wait for each before the next is issued.
struct Wide {
    static constexpr int N = 8;
};
struct Narrow {
    static constexpr int N = 1;
};

struct Span {
    u32 row;
    u32 col;
    // False behind the end: such a span reads as zeros and is not written.
    bool present;
};

// Span number `i` of a matrix, counted row by row. `cols` is not 0.
template <typename Width> __device__ __forceinline__ Span span_of_matrix(u32 i, u32 rows, u32 cols, Width) {
    const u32 per_row = cols / Width::N;
    const u32 row = i / per_row;
    return {row, (i - row * per_row) * Width::N, row < rows};
}

// Span number `i` of a row.
template <typename Width> __device__ __forceinline__ Span span_of_row(u32 row, u32 i, u32 cols, Width) {
    return {row, i * Width::N, i * Width::N < cols};
}

template <typename T> __device__ __forceinline__ f32xn<1> load_span(const T* p, i64 stride, Span s, Narrow) {
    return {{s.present ? to_f32(p[s.row * stride + s.col]) : 0.0f}};
}

__device__ __forceinline__ f32x8 load_span(const bf16* p, i64 stride, Span s, Wide) {
    uint4 w = make_uint4(0, 0, 0, 0);
    if (s.present) w = *reinterpret_cast<const uint4*>(p + s.row * stride + s.col);
    return unpack8(w);
}

__device__ __forceinline__ f32x8 load_span(const float* p, i64 stride, Span s, Wide) {
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    p += s.row * stride + s.col;
    if (s.present) {
        a = *reinterpret_cast<const float4*>(p);
        b = *reinterpret_cast<const float4*>(p + 4);
    }
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <typename T>
__device__ __forceinline__ void store_span(T* p, i64 stride, Span s, Narrow, const f32xn<1>& x) {
    if (s.present) p[s.row * stride + s.col] = from_f32<T>(x.v[0]);
}

template <typename T> __device__ __forceinline__ void store_span(T* p, i64 stride, Span s, Wide, const f32x8& x) {
    if (s.present) store8(p + s.row * stride + s.col, x);
}

// body(width, first): the block handles spans first, first + THREADS, ... (SPANS of them); one call if `wide`, else
// eight, so that a block covers the same THREADS * SPANS * 8 elements either way.
template <int THREADS, int SPANS, typename Body> __device__ __forceinline__ void for_spans(bool wide, Body body) {
    if (wide) {
        body(Wide{}, blockIdx.x * (THREADS * SPANS) + threadIdx.x);
        return;
    }
#pragma unroll 1
    for (u32 k = 0; k < 8; k++) body(Narrow{}, (blockIdx.x * 8 + k) * (THREADS * SPANS) + threadIdx.x);
}

// The second half of a sum over the rows of a block of 8 warps: every warp has added up some of them, lane l the
// columns col + N l .. + N. Writes the sums of columns col .. col + 32 N that exist, that of column c to out[place(c)].
template <int N, typename Place>
__device__ __forceinline__ void store_column_sums(float* out, const f32xn<N>& sum, u32 col, u32 cols, Place place) {
    __shared__ float partial[8][N][33];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) partial[warp][i][lane] = sum.v[i];
    __syncthreads();
    const u32 c = threadIdx.x;
    if (c >= 32 * N || col + c >= cols) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; w++) total += partial[w][c % N][c / N];
    out[place(col + c)] = total;
}

template <int N>
__device__ __forceinline__ void store_column_sums(float* out, const f32xn<N>& sum, u32 col, u32 cols) {
    store_column_sums(out, sum, col, cols, [](u32 c) { return c; });
}
