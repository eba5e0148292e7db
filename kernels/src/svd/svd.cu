// What the decomposition and the split of a weight need beside matrix products: the random start, squared distances,
// and 4-bit codes.

constexpr int THREADS = 256;

// Philox4x32-10 as rng.rs has it.
__device__ __forceinline__ uint4 philox(u64 block, u64 stream, u64 seed) {
    u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = (u32)stream, c3 = (u32)(stream >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// The normal numbers of rng.rs at indices 0 .. count, rounded; a thread makes the four of a block.
extern "C" __global__ void __launch_bounds__(THREADS) svd_start(bf16* x, i64 count, u64 seed, u64 stream) {
    const i64 block = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (block * 4 >= count) return;
    const uint4 words = philox((u64)block, stream, seed);
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        // In (0, 1], so that the logarithm is finite.
        const double u = ((double)w[2 * pair] + 1.0) / 4294967296.0;
        const double radius = sqrt(-2.0 * log(u));
        double sine, cosine;
        sincospi(2.0 * ((double)w[2 * pair + 1] / 4294967296.0), &sine, &cosine);
        const i64 i = block * 4 + 2 * pair;
        if (i < count) x[i] = to_bf16((float)(radius * cosine));
        if (i + 1 < count) x[i + 1] = to_bf16((float)(radius * sine));
    }
}

// partial[block] = the sum of the block's threads, always in the same order.
__device__ __forceinline__ void store_block_sum(double* partial, double sum) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// partial[block] = sum (x - y)^2 over the block's rows in f64; without y, of x^2.
extern "C" __global__ void __launch_bounds__(THREADS)
    svd_distance(double* partial, const float* x, const float* y, i32 stride, i32 rows, i32 cols) {
    double sum = 0.0;
    for (i32 row = blockIdx.x; row < rows; row += gridDim.x) {
        const i64 start = (i64)row * stride;
        for (i32 col = threadIdx.x; col < cols; col += THREADS) {
            const float d = y ? x[start + col] - y[start + col] : x[start + col];
            sum += (double)d * (double)d;
        }
    }
    store_block_sum(partial, sum);
}

// NF4 codes and scales of whole blocks of consecutive elements, a warp per block; the bits of bitsandbytes' CPU path:
// absmax = max |x|; code = number of midpoints between neighbouring values of the table below x * (1 / absmax).
extern "C" __global__ void __launch_bounds__(THREADS)
    svd_pack_nf4(u8* codes, float* absmax, const float* x, const float* table, i32 blocksize, i64 blocks) {
    __shared__ float bounds[15];
    if (threadIdx.x < 15) bounds[threadIdx.x] = (table[threadIdx.x] + table[threadIdx.x + 1]) / 2.0f;
    __syncthreads();
    const i32 lane = threadIdx.x % 32, pairs = blocksize / 2;
    const i64 warps = (i64)gridDim.x * (THREADS / 32);
    for (i64 block = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const float2* in = reinterpret_cast<const float2*>(x + block * blocksize);
        float largest = 0.0f;
        for (i32 i = lane; i < pairs; i += 32) largest = fmaxf(largest, fmaxf(fabsf(in[i].x), fabsf(in[i].y)));
        largest = warp_max(largest);
        if (lane == 0) absmax[block] = largest;
        const float inverse = __fdiv_rn(1.0f, fmaxf(largest, 1e-38f));
        for (i32 i = lane; i < pairs; i += 32) {
            const float first = in[i].x * inverse, second = in[i].y * inverse;
            u32 high = 0, low = 0;
#pragma unroll
            for (int k = 0; k < 15; k++) {
                high += first > bounds[k];
                low += second > bounds[k];
            }
            codes[block * pairs + i] = (u8)(high << 4 | low);
        }
    }
}

__device__ __forceinline__ float round_to_f16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return f16_to_f32(bits);
}

// What an element of a 4-bit weight is rounded to, numbered as in dequantize/frame.cuh.
__device__ __forceinline__ float rounded(float x, i32 rounding) {
    return rounding == 1 ? round_to_f16(x) : rounding == 2 ? to_f32(to_bf16(x)) : x;
}

// partial[block] = sum (x - table[code] * scale)^2 in f64, a warp per block of consecutive elements.
extern "C" __global__ void __launch_bounds__(THREADS)
    svd_distance_four_bit(double* partial, const float* x, const u8* codes, const float* scales, const float* table,
                          i32 rounding, i32 blocksize, i64 blocks) {
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
    const i32 lane = threadIdx.x % 32, pairs = blocksize / 2;
    const i64 warps = (i64)gridDim.x * (THREADS / 32);
    double sum = 0.0;
    for (i64 block = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const float2* in = reinterpret_cast<const float2*>(x + block * blocksize);
        const float scale = scales[block];
        for (i32 i = lane; i < pairs; i += 32) {
            const u32 code = codes[block * pairs + i];
            const double first = in[i].x - rounded(__fmul_rn(values[code >> 4], scale), rounding);
            const double second = in[i].y - rounded(__fmul_rn(values[code & 15], scale), rounding);
            sum += first * first + second * second;
        }
    }
    store_block_sum(partial, sum);
}
