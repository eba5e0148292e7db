// One number for the bits of a matrix, whatever the order of the threads: equal matrices have equal ones.

constexpr int THREADS = 256;

__device__ __forceinline__ u64 mixed(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// out += the sum of a hash of every element and its place.
template <typename T>
__device__ __forceinline__ void digest(u64* out, const T* x, i64 stride, i32 rows, i32 cols) {
    u64 sum = 0;
    for (i32 row = blockIdx.x; row < rows; row += gridDim.x)
        for (i32 col = threadIdx.x; col < cols; col += THREADS)
            sum += mixed((u64)x[row * stride + col] + mixed((u64)row << 32 | (u32)col));
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % 32 == 0) atomicAdd(out, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    digest_16(u64* out, const u16* x, i64 stride, i32 rows, i32 cols) {
    digest(out, x, stride, rows, cols);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    digest_32(u64* out, const u32* x, i64 stride, i32 rows, i32 cols) {
    digest(out, x, stride, rows, cols);
}
