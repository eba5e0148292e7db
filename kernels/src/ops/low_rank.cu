// The gradients that an adapter's branch takes from dy: both in one pass over it, and what follows a library product.

// db += scaling * diag(g) * product: the last step of a scaled branch's gradient.
//
// db (N, R) f32, rows `stride` apart; product (N, R) f32, contiguous; g (N) f32.
extern "C" __global__ void low_rank_add_scaled(float* db, const float* product, const float* g, float scaling,
                                               int rows, int cols, int stride) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    const int n = i / cols;
    db[(i64)n * stride + i % cols] += scaling * g[n] * product[i];
}

// ------------------------------------------------------------------------------------ both gradients

// A block owns COLUMNS of dy and a range of its tokens, which stream through STAGES of shared memory, TOKENS at a time.
// Every warp keeps the sums of dB for its share of the columns in registers over all tokens, and a share of b: for half
// of the tokens of a stage it sums dh over the columns that it has b of, and the block adds these sums up through
// shared memory while it works on the next stage. What blocks leave, low_rank_branch_gradients_finish adds up.
constexpr int TOKENS = 16;

extern __shared__ __align__(128) unsigned char shared[];

// A branch among those of linears that share an input; its blocks begin at `first` in x.
struct Operands {
    const bf16 *dy, *b, *h;
    // (column blocks, T, RANK) and (token blocks, N, RANK).
    float *dh_sums, *db_sums;
    int outputs, rank, dy_stride, b_stride, h_stride, first;
};

// The last of three that begin in this order and at or before this block.
template <typename T> __device__ __forceinline__ T of_block(const T& one, const T& two, const T& three) {
    const int block = blockIdx.x;
    return block < two.first ? one : block < three.first ? two : three;
}

// RANK is R, rounded up to what is there: the columns behind R are zeros.
template <int RANK, int WARPS, int COLUMNS, int STAGES> struct Branch {
    static constexpr int THREADS = WARPS * 32;
    // Warps that share the columns of dh's sum, in either half of the tokens.
    static constexpr int SHARERS = WARPS / 2;
    static constexpr int TILE = TOKENS * COLUMNS * 2;
    static constexpr int STAGE = TILE + TOKENS * RANK * 2;
    // A row of a warp's sums of dh: a warp that stores its fragments hits all banks.
    static constexpr int PITCH = RANK + 4;
    static constexpr int SUMS = WARPS * 8 * PITCH;
    static constexpr int SHARED = STAGES * STAGE + 2 * SUMS * 4;
    static_assert(COLUMNS * RANK / 8 % THREADS == 0, "every thread copies as many chunks of b");
    static_assert(COLUMNS * RANK * 2 <= STAGE + 2 * SUMS * 4, "b lies in the last stage and behind it at first");

    // Sixteen bytes of a tile of dy. Eight rows at one chunk hit all banks, as below.
    static __device__ __forceinline__ u32 wide_at(int row, int chunk) {
        return row * (COLUMNS * 2) + ((chunk ^ (row & 7)) << 4);
    }

    // The same of a tile of h or b, whose rows are 32, 64 or 128 bytes.
    static __device__ __forceinline__ u32 narrow_at(int row, int chunk) {
        constexpr int CHUNKS = RANK / 8;
        return (row * CHUNKS + (chunk ^ (row * CHUNKS / 8 & (CHUNKS - 1)))) << 4;
    }

    // Block (x, y): of its branch, columns (x - first) COLUMNS .. + COLUMNS of tokens y rows .. + rows, a multiple of
    // TOKENS.
    static __device__ __forceinline__ void run(const Operands& branch, int tokens, int rows) {
        const int outputs = branch.outputs, rank = branch.rank, column_block = blockIdx.x - branch.first;
        const i64 dy_stride = branch.dy_stride, b_stride = branch.b_stride, h_stride = branch.h_stride;
        const bf16 *const dy = branch.dy, *const b = branch.b, *const h = branch.h;
        float *const dh_sums = branch.dh_sums, *const db_sums = branch.db_sums;
        const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
        const int column = column_block * COLUMNS, first = blockIdx.y * rows, end = min(tokens, first + rows);
        const int steps = (end - first + TOKENS - 1) / TOKENS;
        const u32 base = shared_address(shared);
        float* const sums = reinterpret_cast<float*>(shared + STAGES * STAGE);

        constexpr int CHUNKS = COLUMNS / 8, NARROW = RANK / 8;
        const u32 b_tile = base + (STAGES - 1) * STAGE;
#pragma unroll
        for (int start = 0; start < COLUMNS * NARROW; start += THREADS) {
            const int n = (start + thread) / NARROW, chunk = (start + thread) % NARROW;
            const bool present = column + n < outputs && chunk * 8 < rank;
            copy16(b_tile + narrow_at(n, chunk), b + (i64)(column + n) * b_stride + chunk * 8, present ? 16 : 0);
        }
        close_copies();

        // This thread's share of the copies of a stage.
        constexpr int APART = THREADS / CHUNKS;
        const int dy_row = thread / CHUNKS, dy_chunk = thread % CHUNKS, h_row = thread / NARROW, h_chunk = thread % NARROW;
        const bool of_dy = column + dy_chunk * 8 < outputs, of_h = h_chunk * 8 < rank;
        const bf16* dy_from = dy + (i64)(first + dy_row) * dy_stride + column + dy_chunk * 8;
        const bf16* h_from = h + (i64)(first + h_row) * h_stride + h_chunk * 8;
        int to_load = first;
        const auto load = [&](u32 stage) {
            if (to_load < end) {
#pragma unroll
                for (int row = 0; row < TOKENS; row += APART)
                    copy16(stage + wide_at(row + dy_row, dy_chunk), dy_from + row * dy_stride,
                           of_dy && to_load + row + dy_row < end ? 16 : 0);
                if (thread < TOKENS * NARROW)
                    copy16(stage + TILE + narrow_at(h_row, h_chunk), h_from, of_h && to_load + h_row < end ? 16 : 0);
            }
            close_copies();
            to_load += TOKENS;
            dy_from += TOKENS * dy_stride;
            h_from += TOKENS * h_stride;
        };
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; stage++) load(base + stage * STAGE);

        // b^T as a left operand: the depth is this warp's columns of dh's sum.
        constexpr int DEPTH = COLUMNS / SHARERS;
        const int half = warp / SHARERS, sharer = warp % SHARERS;
        u32 left[DEPTH / 16][RANK / 16][4];
        wait_for_copies<STAGES - 1>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
            for (int m = 0; m < RANK / 16; m++)
                load_matrices_transposed(left[k][m], b_tile + narrow_at(sharer * DEPTH + k * 16 + lane / 16 * 8 + lane % 8,
                                                                        2 * m + lane / 8 % 2));

        // Where this lane's rows lie for load_matrices: dy for dh, dy and h for dB.
        constexpr int WIDTH = COLUMNS / WARPS;
        const u32 by_columns = wide_at(half * 8 + lane % 8, sharer * (DEPTH / 8) + lane / 8);
        const u32 by_tokens = wide_at(lane / 16 * 8 + lane % 8, warp * (WIDTH / 8) + lane / 8 % 2);
        const u32 h_by_tokens = TILE + narrow_at(lane % 16, lane / 16);

        // This thread's part of the sums of a stage, over the sharers: of a token, rank elements 32 apart.
        const int token = RANK == 16 ? warp % 4 + lane / 16 * 4 : warp % 8;
        const int token_half = RANK == 16 ? warp / 4 : warp / 8;
        const int element = RANK == 16 ? lane % 16 : lane;
        const float* const to_add = sums + (token_half * SHARERS * 8 + token) * PITCH + element;
        const auto add_up = [&](int step) {
            const int t = first + step * TOKENS + token_half * 8 + token;
            if (t >= end) return;
            float* to = dh_sums + ((i64)column_block * tokens + t) * RANK + element;
#pragma unroll
            for (int r = 0; r < RANK; r += 32) {
                float sum = 0.0f;
#pragma unroll
                for (int s = 0; s < SHARERS; s++) sum += to_add[step % 2 * SUMS + s * (8 * PITCH) + r];
                to[r] = sum;
            }
        };

        float db[WIDTH / 16][RANK / 8][4] = {};
        u32 stage = base, free_stage = b_tile;
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
            load(free_stage);
            free_stage = stage;
            if (step > 0) add_up(step - 1);

            // dh^T = b^T dy^T; one chain of products would wait for itself.
            constexpr int CHAINS = RANK == 16 ? 2 : 1;
            float dh[CHAINS][RANK / 16][4] = {};
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k += 2) {
                u32 right[4];
                load_matrices(right, stage + (by_columns ^ (2 * k & 7) << 4) + (2 * k >> 3) * 128);
#pragma unroll
                for (int m = 0; m < RANK / 16; m++) {
                    mma(dh[0][m], left[k][m], right[0], right[1]);
                    mma(dh[CHAINS - 1][m], left[k + 1][m], right[2], right[3]);
                }
            }

            // dB += dy^T h
            u32 right[RANK / 16][4];
#pragma unroll
            for (int r = 0; r < RANK / 16; r++)
                load_matrices_transposed(right[r], stage + (h_by_tokens ^ 2 * r << 4));
#pragma unroll
            for (int m = 0; m < WIDTH / 16; m++) {
                u32 columns[4];
                load_matrices_transposed(columns, stage + (by_tokens ^ 2 * m << 4));
#pragma unroll
                for (int r = 0; r < RANK / 16; r++) {
                    mma(db[m][2 * r], columns, right[r][0], right[r][1]);
                    mma(db[m][2 * r + 1], columns, right[r][2], right[r][3]);
                }
            }

            float* const to = sums + step % 2 * SUMS + (warp * 8 + lane % 4 * 2) * PITCH + lane / 4;
#pragma unroll
            for (int m = 0; m < RANK / 16; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    to[i % 2 * PITCH + m * 16 + i / 2 * 8] =
                        CHAINS == 2 ? dh[0][m][i] + dh[CHAINS - 1][m][i] : dh[0][m][i];
            stage = stage == b_tile ? base : stage + STAGE;
        }
        __syncthreads();
        add_up(steps - 1);

        const int n = column + warp * WIDTH + lane / 4;
        float* const to = db_sums + ((i64)blockIdx.y * outputs + n) * RANK + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < WIDTH / 16; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (n + m * 16 + i * 8 < outputs)
#pragma unroll
                    for (int r = 0; r < RANK / 8; r++)
                        *reinterpret_cast<float2*>(to + (m * 16 + i * 8) * RANK + r * 8) =
                            make_float2(db[m][r][2 * i], db[m][r][2 * i + 1]);
    }
};

using Rank16 = Branch<16, 8, 512, 4>;
using Rank32 = Branch<32, 16, 512, 3>;
using Rank64 = Branch<64, 16, 256, 3>;

extern "C" __global__ void __launch_bounds__(Rank16::THREADS, 2)
    low_rank_branch_gradients_r16(Operands one, Operands two, Operands three, int tokens, int rows) {
    Rank16::run(of_block(one, two, three), tokens, rows);
}

extern "C" __global__ void __launch_bounds__(Rank32::THREADS, 1)
    low_rank_branch_gradients_r32(Operands one, Operands two, Operands three, int tokens, int rows) {
    Rank32::run(of_block(one, two, three), tokens, rows);
}

extern "C" __global__ void __launch_bounds__(Rank64::THREADS, 1)
    low_rank_branch_gradients_r64(Operands one, Operands two, Operands three, int tokens, int rows) {
    Rank64::run(of_block(one, two, three), tokens, rows);
}

// ------------------------------------------------------------------------------------ the sums of all blocks

// Threads of a block, and partial sums that each has in flight.
constexpr int FINISHERS = 256, IN_FLIGHT = 8;

__device__ __forceinline__ void add(float4& a, float4 b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

// What becomes of the sums of a branch: dh = the sum of its column blocks, to `twin` also unless that is null;
// db += scaling diag(g) (the sum of its token blocks), g ones if null. Its first `dh_blocks` blocks, from `first` on, do dh.
// `dh_lanes` or `db_lanes` threads, a power of two, share the partial sums of four neighbouring elements.
struct Sums {
    bf16 *dh, *twin;
    float* db;
    const float *dh_sums, *db_sums, *g;
    float scaling;
    int outputs, rank, dh_stride, twin_stride, db_stride, column_blocks, dh_lanes, dh_blocks, first;
};

extern "C" __global__ void __launch_bounds__(FINISHERS)
    low_rank_branch_gradients_finish(Sums one, Sums two, Sums three, int tokens, int padded_rank, int token_blocks,
                                     int db_lanes) {
    __shared__ float4 partial[FINISHERS];
    const Sums sums = of_block(one, two, three);
    const int block = blockIdx.x - sums.first, outputs = sums.outputs, rank = sums.rank;
    const bool of_dh = block < sums.dh_blocks;
    const int lanes = of_dh ? sums.dh_lanes : db_lanes, count = of_dh ? sums.column_blocks : token_blocks;
    const u32 fours = (u32)(of_dh ? tokens : outputs) * padded_rank / 4, per_block = FINISHERS / lanes;
    const u32 place = threadIdx.x % per_block, first = threadIdx.x / per_block;
    const u32 i = (block - (of_dh ? 0 : sums.dh_blocks)) * per_block + place, row = i * 4 / padded_rank;
    const int r = i * 4 % padded_rank;
    const bool present = i < fours && r < rank;
    const float4* const from = reinterpret_cast<const float4*>(of_dh ? sums.dh_sums : sums.db_sums) + i;
    const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 sum = none;
    if (present)
        for (int k = first; k < count; k += IN_FLIGHT * lanes) {
            float4 x[IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) x[u] = k + u * lanes < count ? from[(i64)(k + u * lanes) * fours] : none;
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) add(sum, x[u]);
        }
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (first != 0 || !present) return;
    for (int k = 1; k < lanes; k++) add(sum, partial[k * per_block + place]);
    const float x[4] = {sum.x, sum.y, sum.z, sum.w};
    const float by = sums.g && !of_dh ? sums.scaling * sums.g[row] : sums.scaling;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (of_dh) {
            const bf16 y = to_bf16(x[e]);
            sums.dh[(i64)row * sums.dh_stride + r + e] = y;
            if (sums.twin) sums.twin[(i64)row * sums.twin_stride + r + e] = y;
        } else {
            sums.db[(i64)row * sums.db_stride + r + e] += by * x[e];
        }
    }
}
