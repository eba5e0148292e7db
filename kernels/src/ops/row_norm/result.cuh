// From the sums of a row to its norm, and what is folded with it.

// Below this part of |W|^2 + s^2 |B A|^2 the factored square is not trusted.
constexpr double CANCELLATION = 1e-3;

// Warps of a block at most.
constexpr int MOST_WARPS = 16;

// The 16 bytes of what many blocks read.
__device__ __forceinline__ uint4 load_shared_by_all(const bf16* p) {
    uint4 x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// The sum over neighbouring `lanes`, a power of two.
__device__ __forceinline__ double sum_over(double x, u32 lanes) {
    for (u32 d = lanes / 2; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// The factors of s B A.
struct Factors {
    const float* b;
    const bf16* a;
    u32 b_stride, a_stride, rank;
    float scaling;

    // Element (row, col) of s B A.
    __device__ __forceinline__ double product(u32 row, u32 col) const {
        double sum = 0.0;
#pragma unroll 1
        for (u32 r = 0; r < rank; r++)
            sum += (double)b[(u64)row * b_stride + r] * to_f32(a[(u64)r * a_stride + col]);
        return scaling * sum;
    }
};

// A row of the result, and what the lanes that share it read of it before one of them writes.
struct Row {
    u32 index;
    bool exists;
    double own;
    float magnitude;
};

// What a kernel writes: norm = sqrt(|W|^2 + 2 s W . (B A) + s^2 |B A|^2); and, where `g` is given, what is folded with
// it: g = m / norm, 0 where the norm is 0, and folded_b = s diag(g) B.
struct Results {
    float *norm, *g;
    bf16* folded_b;
    i64 folded_b_stride;
    const float *w_squared, *m;

    // A row past the last is a copy of the last, and not written.
    __device__ __forceinline__ Row read(u32 index, u32 rows) const {
        const u32 i = min(index, rows - 1);
        return {i, index < rows, w_squared[i], g == nullptr ? 0.0f : m[i]};
    }

    // By a warp, of which neighbouring `lanes` (a power of two) share a row and have the same sums: cross = W . (B A),
    // low_rank = |B A|^2. Rows that B A nearly cancels are measured: `measure(l)` is |W + s B A|^2 of the row of lane l,
    // by a warp.
    template <typename Measure>
    __device__ __forceinline__ void write(const Factors& ba, const Row& row, u32 lanes, double cross, double low_rank,
                                          Measure measure) const {
        const u32 lane = threadIdx.x % 32, part = lane % lanes;
        const double s = ba.scaling;
        low_rank *= s * s;
        double square = row.own + 2.0 * s * cross + low_rank;
        const bool cancels = square < CANCELLATION * (row.own + low_rank) || square < 0.0;
        const u32 near = __ballot_sync(0xffffffffu, row.exists && cancels);
#pragma unroll 1
        for (u32 first = 0; near != 0 && first < 32; first += lanes) {
            if ((near >> first & 1) == 0) continue;
            const double measured = measure(first);
            if (lane / lanes == first / lanes) square = measured;
        }
        if (!row.exists) return;
        const float length = (float)sqrt(square);
        if (part == 0) norm[row.index] = length;
        if (g == nullptr) return;
        const float factor = length == 0.0f ? 0.0f : row.magnitude / length;
        if (part == 0) g[row.index] = factor;
#pragma unroll 1
        for (u32 q = part; q < ba.rank; q += lanes)
            folded_b[row.index * folded_b_stride + q] =
                to_bf16(ba.scaling * factor * ba.b[(u64)row.index * ba.b_stride + q]);
    }
};

#define RESULT_PARAMETERS                                                                                              \
    float *norm, const float *w_squared, const bf16 *a, i32 a_stride, const float *b, i32 b_stride, const float *m,    \
        float *g, bf16 *folded_b, i32 folded_b_stride, float scaling, i32 rank
#define FACTORS                                                                                                        \
    { b, a, (u32)b_stride, (u32)a_stride, (u32)rank, scaling }
#define RESULTS                                                                                                        \
    { norm, g, folded_b, folded_b_stride, w_squared, m }
