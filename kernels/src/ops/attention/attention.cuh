// Attention over packed sequences with mma.sync (sm_80 and newer): what forward and backward share.
//
// Compiled once per head dimension: `attention_d128.cu` and its siblings define it and the tile sizes; `mma.cuh`,
// `attention_common.cuh`, this file, `attention_forward.cuh` and `attention_backward.cuh` follow. A block is four
// warps; each warp owns 16 or 32 rows of the block's tile and keeps their sums in registers, while tiles of the other
// side stream through two stages of shared memory. There are no atomics: in the backward some blocks walk over queries and sum dK and dV (of all
// query heads of the group), the others walk over keys and sum dQ; both recompute the probabilities from lse.

constexpr int THREADS = 128;
constexpr int CHUNKS = D / 8;
// Eight rows at one chunk of 16 bytes must hit all banks: by XOR where a row is whole 128-byte lines, else by a
// row of an odd number of chunks.
constexpr bool SWIZZLED = CHUNKS % 8 == 0;
constexpr int PITCH = (SWIZZLED ? CHUNKS : CHUNKS + 1) * 16;

// ------------------------------------------------------------------------------------ instructions

__device__ __forceinline__ uint4 load_shared16(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_shared16(u32 address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared4(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ------------------------------------------------------------------------------------ tiles in shared memory

__device__ __forceinline__ u32 chunk_at(int row, int chunk) {
    return row * PITCH + ((SWIZZLED ? chunk ^ (row & 7) : chunk) << 4);
}

// Where this lane's row lies for load_matrices: `by_rows` for the left operand and for a right operand whose rows
// are summed over (transposed), `by_columns` for a right operand whose rows are the columns of the product.
__device__ __forceinline__ u32 by_rows(u32 tile) { return tile + chunk_at(lane_id() % 16, lane_id() / 16); }
__device__ __forceinline__ u32 by_columns(u32 tile) {
    return tile + chunk_at(lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
}

// `row` is a multiple of 8, `chunk` even.
__device__ __forceinline__ u32 moved(u32 lane_address, int row, int chunk) {
    return (SWIZZLED ? (lane_address ^ ((chunk & 7) << 4)) + (chunk >> 3) * 128 : lane_address + chunk * 16) +
           row * PITCH;
}

__device__ __forceinline__ uint4 load_unaligned(const bf16* p) {
    const u16* x = &p->bits;
    return make_uint4(x[0] | (u32)x[1] << 16, x[2] | (u32)x[3] << 16, x[4] | (u32)x[5] << 16,
                      x[6] | (u32)x[7] << 16);
}

// What load_tile wants added to the tile's first element: this thread's first chunk, where all of its chunks are
// whole rows apart.
__device__ __forceinline__ i64 load_offset(i64 stride) {
    return THREADS % CHUNKS == 0 ? threadIdx.x / CHUNKS * stride + threadIdx.x % CHUNKS * 8 : 0;
}

// Enqueues the copy of a head of ROWS tokens from x - load_offset on; rows from `rows` on become zero.
template <int ROWS>
__device__ __forceinline__ void load_tile(u32 tile, const bf16* x, i64 stride, int rows, bool aligned) {
    constexpr int N = ROWS * CHUNKS, STEP = THREADS / CHUNKS;
    if (THREADS % CHUNKS == 0) {
        const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        if (aligned) {
#pragma unroll
            for (int row = 0; row < ROWS; row += STEP) {
                copy16(tile + chunk_at(row + first, chunk), x, row + first < rows ? 16 : 0);
                x += STEP * stride;
            }
        } else {
#pragma unroll 1
            for (int row = first; row < ROWS; row += STEP) {
                store_shared16(tile + chunk_at(row, chunk), row < rows ? load_unaligned(x) : make_uint4(0, 0, 0, 0));
                x += STEP * stride;
            }
        }
    } else if (aligned) {
#pragma unroll
        for (int start = 0; start < N; start += THREADS) {
            const int i = start + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
            if (N % THREADS == 0 || i < N)
                copy16(tile + chunk_at(row, chunk), x + row * stride + chunk * 8, row < rows ? 16 : 0);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < N; i += THREADS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            store_shared16(tile + chunk_at(row, chunk),
                           row < rows ? load_unaligned(x + row * stride + chunk * 8) : make_uint4(0, 0, 0, 0));
        }
    }
}

// Rounds the sums of a warp's rows and writes those before `rows`; `tile` is the warp's to overwrite.
template <int MT>
__device__ __forceinline__ void store_rows(bf16* y, i64 stride, int rows, u32 tile, const float (&sum)[MT][D / 8][4],
                                           const float (&factor)[MT][2]) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                store_shared4(tile + chunk_at(m * 16 + r * 8 + lane_id() / 4, n) + lane_id() % 4 * 4,
                              pack_bf16(sum[m][n][2 * r] * factor[m][r], sum[m][n][2 * r + 1] * factor[m][r]));
    __syncwarp();
    const bool aligned = aligned16(y, stride);
#pragma unroll 4
    for (int i = lane_id(); i < MT * 16 * CHUNKS; i += 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (row >= rows) break;
        const uint4 x = load_shared16(tile + chunk_at(row, chunk));
        bf16* p = y + row * stride + chunk * 8;
        if (aligned) {
            *reinterpret_cast<uint4*>(p) = x;
        } else {
            const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int j = 0; j < 8; j++) p[j].bits = (u16)(words[j / 2] >> (j % 2 * 16));
        }
    }
}

// ------------------------------------------------------------------------------------ products of a warp

template <int MT, int NT> __device__ __forceinline__ void clear(float (&x)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] = 0.0f;
}

// s = a b^T over the head dimension: a's rows are the warp's, b's rows the columns of s.
template <int MT, int NT> __device__ __forceinline__ void scores(float (&s)[MT][NT][4], u32 a, u32 b) {
    clear(s);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 left[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrices(left[m], moved(a, m * 16, 2 * k));
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            u32 right[4];
            load_matrices(right, moved(b, n * 16, 2 * k));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(s[m][2 * n], left[m], right[0], right[1]);
                mma(s[m][2 * n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// sum += p x, p packed from what `scores` left, x's rows the columns of p.
template <int MT, int NT>
__device__ __forceinline__ void mix(float (&sum)[MT][D / 8][4], const u32 (&p)[MT][NT][2], u32 x) {
#pragma unroll
    for (int k = 0; k < NT / 2; k++)
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 right[4];
            load_matrices_transposed(right, moved(x, k * 16, 2 * n));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const u32 left[4] = {p[m][2 * k][0], p[m][2 * k][1], p[m][2 * k + 1][0], p[m][2 * k + 1][1]};
                mma(sum[m][2 * n], left, right[0], right[1]);
                mma(sum[m][2 * n + 1], left, right[2], right[3]);
            }
        }
}

template <int MT, int NT>
__device__ __forceinline__ void pack(u32 (&y)[MT][NT][2], const float (&x)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) y[m][n][r] = pack_bf16(x[m][n][2 * r], x[m][n][2 * r + 1]);
}

// ------------------------------------------------------------------------------------ scores

// How scores become exponents: exponent = factor * s, of the raw s unless `special`.
struct Scoring {
    float scale, softcap, per_softcap, factor;
    int window;
    bool special;

    __device__ __forceinline__ Scoring(float scale, float softcap, int window)
        : scale(scale), softcap(softcap), window(window) {
        // A factor that is not positive cannot be applied after the maximum.
        per_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
        special = softcap > 0.0f || !(scale > 0.0f);
        factor = special ? LOG2E : scale * LOG2E;
    }

    template <int MT, int NT> __device__ __forceinline__ void apply(float (&s)[MT][NT][4]) const {
        if (!special) return;
        const float inner = 2.0f * LOG2E * scale * per_softcap;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& x = s[m][n][i];
                    // tanh x = 1 - 2 / (1 + e^2x)
                    x = softcap > 0.0f ? softcap * (1.0f - 2.0f * reciprocal(1.0f + exp2_fast(inner * x))) : scale * x;
                }
    }

    // p becomes p (1 - tanh^2), the derivative of the capped score; s is what `apply` left.
    __device__ __forceinline__ float capped(float p, float s) const {
        const float t = s * per_softcap;
        return p > 0.0f ? p * (1.0f - t * t) : 0.0f;
    }
};

// Hides the scores whose column lies outside of (first, last] of its row, both counted from the tile's column 0.
// `last` is of the warp's row 0 and moves by +1 per row; a window <= 0 hides nothing on the left.
template <int MT, int NT> __device__ __forceinline__ void hide_keys(float (&s)[MT][NT][4], int last, int window) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = m * 16 + i / 2 * 8 + lane_id() / 4, column = n * 8 + lane_id() % 4 * 2 + i % 2;
                if (column > last + row || (window > 0 && column <= last + row - window)) s[m][n][i] = HIDDEN;
            }
}

// The same with keys as rows and queries as columns: `first` is the first query that sees the warp's key 0.
template <int MT, int NT> __device__ __forceinline__ void hide_queries(float (&s)[MT][NT][4], int first, int window) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = m * 16 + i / 2 * 8 + lane_id() / 4, column = n * 8 + lane_id() % 4 * 2 + i % 2;
                if (column < first + row || (window > 0 && column >= first + row + window)) s[m][n][i] = HIDDEN;
            }
}

extern __shared__ __align__(128) unsigned char tiles[];
