// The backward pass of y = silu(gate) up together with what the low-rank branches on either side of it take from the same
// elements: dA of the branch that reads y, dh and dB of those that made gate and up. Apart, these would write y and read it,
// dgate and dup once more.
//
// A block owns COLUMNS columns and a range of tokens, which stream through STAGES of shared memory, TOKENS at a time; a
// warp owns WIDTH of the columns, and but for the sums of dh needs no other. A lane holds eight columns of four tokens,
// so that the elements of one column, packed token beside token, are the right operand of the products that sum over
// tokens: dA = dh^T y and dB^T = h^T dgate, in registers all along. Packed column beside column they are what is
// written, and through shared memory the left operand of dh = dgate b, whose sums over the columns of a block are added up
// while it works on the next stage. What blocks leave, swiglu_low_rank_finish adds up.

constexpr int TOKENS = 16, RANK = 16, WIDTH = 64, WARPS = 8, COLUMNS = 512, STAGES = 3;
constexpr int THREADS = WARPS * 32;
// Bytes of a tile of dy, gate or up, of one of h or dh, of a stage with three of either, and of a tile of b.
constexpr int TILE = TOKENS * COLUMNS * 2, NARROW = TOKENS * RANK * 2, STAGE = 3 * (TILE + NARROW);
constexpr int B_TILE = COLUMNS * RANK * 2;
// All warps' sums of one branch's dh, in floats.
constexpr int SUMS = WARPS * TOKENS * RANK;

extern __shared__ __align__(128) unsigned char shared[];

struct Rows {
    const bf16* p;
    i32 stride;
};

// Low-rank rows of `rank` columns; the columns behind are zeros.
struct NarrowRows {
    const bf16* p;
    i32 stride, rank;
};

struct Results {
    bf16 *dgate, *dup;
    i32 dgate_stride, dup_stride;
    // Of gate and up: (column blocks, T, RANK) each.
    float* dh_sums;
    // dA, dB of gate, dB of up: (token blocks, RANK, cols) each.
    float* factor_sums;
    // Of gate and up, if they have factors: (token blocks, cols) each.
    float* scale_sums;
};

// Sixteen bytes of a row of a tile; eight rows at one chunk hit all banks.
__device__ __forceinline__ u32 wide_at(int row, int chunk) {
    return row * (COLUMNS * 2) + ((chunk ^ (row & 7)) << 4);
}

// The same of a tile of h, dh or b, whose rows are 32 bytes.
__device__ __forceinline__ u32 narrow_at(int row, int chunk) { return (row * 2 + (chunk ^ (row >> 2 & 1))) << 4; }

// Where a warp's sum of dh lies among its own: a warp that stores its fragments hits all banks.
__device__ __forceinline__ int sum_at(int token, int r) { return token * RANK + (r ^ (token >> 1 & 1) * 8); }

// The lower or the upper halves of both.
__device__ __forceinline__ u32 halves(u32 a, u32 b, bool upper) { return __byte_perm(a, b, upper ? 0x7632 : 0x5410); }

// gate_factor, up_factor: what the columns of gate and up are multiplied by, null for ones. b: (cols, rank); h, dh:
// (tokens, rank). Block (x, y): columns x COLUMNS .. + COLUMNS of tokens y rows .. + rows, a multiple of TOKENS.
template <bool SCALED>
__device__ __forceinline__ void backward(Results to, Rows dy, Rows gate, Rows up, const float* gate_factor,
                                         const float* up_factor, NarrowRows dh, const NarrowRows (&b)[2],
                                         const NarrowRows (&h)[2], int tokens, int cols, int rows) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int column = blockIdx.x * COLUMNS, first = blockIdx.y * rows, end = min(tokens, first + rows);
    const int steps = (end - first + TOKENS - 1) / TOKENS;
    const u32 base = shared_address(shared), b_tiles = base + STAGES * STAGE;
    float* const sums = reinterpret_cast<float*>(shared + STAGES * STAGE + 2 * B_TILE);
    float* const factors = sums + 4 * SUMS;

#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int start = 0; start < COLUMNS * 2; start += THREADS) {
            const int n = (start + thread) / 2, chunk = thread % 2;
            const bool present = column + n < cols && chunk * 8 < b[which].rank;
            copy16(b_tiles + which * B_TILE + narrow_at(n, chunk),
                   b[which].p + (i64)(column + n) * b[which].stride + chunk * 8, present ? 16 : 0);
        }
    close_copies();
    if constexpr (SCALED)
        for (int n = thread; n < COLUMNS; n += THREADS) {
            factors[n] = column + n < cols ? gate_factor[column + n] : 0.0f;
            factors[COLUMNS + n] = column + n < cols ? up_factor[column + n] : 0.0f;
        }

    // This thread's share of the copies of a stage: every fourth row of a chunk of its warp's, and of the narrow tiles a
    // row's half by each lane of the first three warps.
    const int copy_row = lane / 8, copy_column = column + warp * WIDTH + lane % 8 * 8;
    const bool of_wide = copy_column < cols;
    const NarrowRows narrow = {warp == 0 ? dh.p : warp == 1 ? h[0].p : h[1].p,
                               warp == 0 ? dh.stride : warp == 1 ? h[0].stride : h[1].stride,
                               warp == 0 ? dh.rank : warp == 1 ? h[0].rank : h[1].rank};
    const bool of_narrow = lane % 2 * 8 < narrow.rank;
    int to_load = first;
    const auto load = [&](u32 stage) {
        if (to_load < end) {
            const auto tile = [&](u32 at, Rows from) {
#pragma unroll
                for (int row = 0; row < TOKENS; row += 4) {
                    const int t = to_load + row + copy_row;
                    copy16(at + wide_at(row + copy_row, warp * 8 + lane % 8), from.p + (i64)t * from.stride + copy_column,
                           of_wide && t < end ? 16 : 0);
                }
            };
            tile(stage, dy);
            tile(stage + TILE, gate);
            tile(stage + 2 * TILE, up);
            const int t = to_load + lane / 2;
            if (warp < 3)
                copy16(stage + 3 * TILE + warp * NARROW + narrow_at(lane / 2, lane % 2),
                       narrow.p + (i64)t * narrow.stride + lane % 2 * 8, of_narrow && t < end ? 16 : 0);
        }
        close_copies();
        to_load += TOKENS;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) load(base + stage * STAGE);

    // The sums over the warps of a token and rank element per thread, of both branches.
    const auto add_up = [&](int step) {
        const int t = first + step * TOKENS + thread / RANK;
        if (t >= end) return;
        const float* const from = sums + step % 2 * (2 * SUMS) + sum_at(thread / RANK, thread % RANK);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += from[which * SUMS + w * (TOKENS * RANK)];
            to.dh_sums[(((i64)which * gridDim.x + blockIdx.x) * tokens + t) * RANK + thread % RANK] = sum;
        }
    };

    // This lane's tokens, in the order of a right operand's rows, and its columns.
    const int quad = lane % 4, chunk = lane / 4, mine = column + warp * WIDTH + chunk * 8;
    const bool inside = mine < cols;
    // Whether a lane takes the second four of its columns first, so that half a warp hits all banks.
    const int turn = chunk / 2 % 2;
    const auto token_of = [&](int i) { return quad * 2 + i % 2 + i / 2 * 8; };

    float products[3][8][4] = {};
    float gate_sum[8] = {}, up_sum[8] = {};
    u32 stage = 0, free_stage = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load(base + free_stage);
        free_stage = stage;
        if (step > 0) add_up(step - 1);

        u32 left[3][4];
        const u32 narrow_tiles = base + stage + 3 * TILE + narrow_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int which = 0; which < 3; which++) load_matrices_transposed(left[which], narrow_tiles + which * NARROW);

#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint2 d[4], g[4], u[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned char* const at = shared + stage + wide_at(token_of(i), warp * 8 + chunk) + (half ^ turn) * 8;
                d[i] = *reinterpret_cast<const uint2*>(at);
                g[i] = *reinterpret_cast<const uint2*>(at + TILE);
                u[i] = *reinterpret_cast<const uint2*>(at + 2 * TILE);
            }
#pragma unroll
            for (int w = 0; w < 2; w++) {
                float2 gate_by = {1.0f, 1.0f}, up_by = {1.0f, 1.0f};
                if constexpr (SCALED) {
                    const float* const at = factors + warp * WIDTH + chunk * 8 + (half ^ turn) * 4 + 2 * w;
                    gate_by = *reinterpret_cast<const float2*>(at);
                    up_by = *reinterpret_cast<const float2*>(at + COLUMNS);
                }
                u32 of_gate[2][2], of_up[2][2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int j = half * 4 + w * 2 + e;
                    const float by = e == 0 ? gate_by.x : gate_by.y, of = e == 0 ? up_by.x : up_by.y;
                    float dg[4], du[4], y[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u32 dw = w == 0 ? d[i].x : d[i].y, gw = w == 0 ? g[i].x : g[i].y, uw = w == 0 ? u[i].x : u[i].y;
                        const float dy_of = e == 0 ? low_f32(dw) : high_f32(dw);
                        float x = e == 0 ? low_f32(gw) : high_f32(gw), v = e == 0 ? low_f32(uw) : high_f32(uw);
                        if constexpr (SCALED) {
                            x *= by;
                            v *= of;
                        }
                        const Act act = Silu::at(x);
                        dg[i] = dy_of * v * act.slope;
                        du[i] = dy_of * act.value;
                        y[i] = v * act.value;
                        if constexpr (SCALED) {
                            gate_sum[j] += dg[i] * x;
                            up_sum[j] += du[i] * v;
                            dg[i] *= by;
                            du[i] *= of;
                        }
                    }
                    mma(products[0][j], left[0], pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]));
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        of_gate[e][i] = pack_bf16(dg[2 * i], dg[2 * i + 1]);
                        of_up[e][i] = pack_bf16(du[2 * i], du[2 * i + 1]);
                    }
                    mma(products[1][j], left[1], of_gate[e][0], of_gate[e][1]);
                    mma(products[2][j], left[2], of_up[e][0], of_up[e][1]);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32& gate_word = w == 0 ? g[i].x : g[i].y;
                    u32& up_word = w == 0 ? u[i].x : u[i].y;
                    gate_word = halves(of_gate[0][i / 2], of_gate[1][i / 2], i % 2);
                    up_word = halves(of_up[0][i / 2], of_up[1][i / 2], i % 2);
                }
            }
            // The gradients take the place of gate and up.
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned char* const at = shared + stage + wide_at(token_of(i), warp * 8 + chunk) + (half ^ turn) * 8;
                *reinterpret_cast<uint2*>(at + TILE) = g[i];
                *reinterpret_cast<uint2*>(at + 2 * TILE) = u[i];
            }
        }
        __syncwarp();

#pragma unroll
        for (int row = 0; row < TOKENS; row += 4) {
            const unsigned char* const at = shared + stage + wide_at(row + copy_row, warp * 8 + lane % 8);
            const int t = first + step * TOKENS + row + copy_row;
            if (of_wide && t < end) {
                *reinterpret_cast<uint4*>(to.dgate + (i64)t * to.dgate_stride + copy_column) =
                    *reinterpret_cast<const uint4*>(at + TILE);
                *reinterpret_cast<uint4*>(to.dup + (i64)t * to.dup_stride + copy_column) =
                    *reinterpret_cast<const uint4*>(at + 2 * TILE);
            }
        }

        // dh = dgate b over this warp's columns
        float* const warp_sums = sums + step % 2 * (2 * SUMS) + warp * (TOKENS * RANK);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float dh_sum[2][4] = {};
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++) {
                u32 gradients[4], right[4];
                load_matrices(gradients, base + stage + (1 + which) * TILE +
                                             wide_at(lane % 16, warp * 8 + 2 * k + lane / 16));
                load_matrices_transposed(right, b_tiles + which * B_TILE +
                                                    narrow_at(warp * WIDTH + k * 16 + lane % 16, lane / 16));
                mma(dh_sum[0], gradients, right[0], right[1]);
                mma(dh_sum[1], gradients, right[2], right[3]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    *reinterpret_cast<float2*>(warp_sums + which * SUMS + sum_at(chunk + 8 * i, n * 8 + quad * 2)) =
                        make_float2(dh_sum[n][2 * i], dh_sum[n][2 * i + 1]);
        }
        stage = stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
    }
    __syncthreads();
    add_up(steps - 1);

    // Column 8 n + j of a warp's, or 4 from there, is column n of product j.
#pragma unroll
    for (int which = 0; which < 3; which++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = chunk + i / 2 * 8, n = column + warp * WIDTH + (quad * 2 + i % 2) * 8;
            if (n >= cols) continue;
            float* const at = to.factor_sums + (((i64)which * gridDim.y + blockIdx.y) * RANK + r) * cols + n;
#pragma unroll
            for (int j = 0; j < 8; j += 4)
                *reinterpret_cast<float4*>(at + (j ^ quad % 2 * 4)) = make_float4(
                    products[which][j][i], products[which][j + 1][i], products[which][j + 2][i], products[which][j + 3][i]);
        }
    if constexpr (SCALED) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int apart = 1; apart < 4; apart *= 2) {
                gate_sum[j] += __shfl_xor_sync(0xffffffffu, gate_sum[j], apart);
                up_sum[j] += __shfl_xor_sync(0xffffffffu, up_sum[j], apart);
            }
        if (quad < 2 && inside) {
            float* const at = to.scale_sums + ((i64)quad * gridDim.y + blockIdx.y) * cols + mine;
#pragma unroll
            for (int j = 0; j < 8; j++) at[j ^ turn * 4] = quad == 0 ? gate_sum[j] : up_sum[j];
        }
    }
}

#define ENTRY(NAME, SCALED)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        NAME(bf16* dgate, i32 dgate_stride, bf16* dup, i32 dup_stride, float* dh_sums, float* factor_sums,             \
             float* scale_sums, const bf16* dy, i32 dy_stride, const bf16* gate, i32 gate_stride, const bf16* up,      \
             i32 up_stride, const float* gate_factor, const float* up_factor, const bf16* dh, i32 dh_stride,           \
             i32 dh_rank, const bf16* gate_b, i32 gate_b_stride, i32 gate_rank, const bf16* up_b, i32 up_b_stride,     \
             i32 up_rank, const bf16* gate_h, i32 gate_h_stride, const bf16* up_h, i32 up_h_stride, i32 tokens,        \
             i32 cols, i32 rows) {                                                                                     \
        const NarrowRows b[2] = {{gate_b, gate_b_stride, gate_rank}, {up_b, up_b_stride, up_rank}};                    \
        const NarrowRows h[2] = {{gate_h, gate_h_stride, gate_rank}, {up_h, up_h_stride, up_rank}};                    \
        backward<SCALED>({dgate, dup, dgate_stride, dup_stride, dh_sums, factor_sums, scale_sums}, {dy, dy_stride},    \
                         {gate, gate_stride}, {up, up_stride}, gate_factor, up_factor, {dh, dh_stride, dh_rank}, b, h, \
                         tokens, cols, rows);                                                                          \
    }

ENTRY(swiglu_backward_low_rank, false)
ENTRY(swiglu_backward_low_rank_scaled, true)

// ------------------------------------------------------------------------------------ the sums of all blocks

constexpr int FINISHERS = 256;

__device__ __forceinline__ void add(float4& a, float4 b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

// Parameters lie wherever the ones before them end: one float at a time.
__device__ __forceinline__ void add_to(float* to, float4 x, float by) {
    to[0] += by * x.x;
    to[1] += by * x.y;
    to[2] += by * x.z;
    to[3] += by * x.w;
}

// The sum of `count` arrays of float4, `apart` elements after one another.
__device__ __forceinline__ float4 sum_of(const float* from, i64 apart, int count) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int k = 0; k < count; k++) add(sum, *reinterpret_cast<const float4*>(from + k * apart));
    return sum;
}

// dh = the sum of its column blocks, and once more to the twin unless that is null.
__device__ __forceinline__ void finish_dh(bf16* dh, i32 stride, bf16* twin, i32 twin_stride, const float* sums, int rank,
                                          int tokens, int column_blocks, u32 i) {
    const u32 t = i / (RANK / 4), r = i % (RANK / 4) * 4;
    if (t >= (u32)tokens || r >= (u32)rank) return;
    const float4 sum = sum_of(sums + (i64)i * 4, (i64)tokens * RANK, column_blocks);
    const uint2 y = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    *reinterpret_cast<uint2*>(dh + (i64)t * stride + r) = y;
    if (twin) *reinterpret_cast<uint2*>(twin + (i64)t * twin_stride + r) = y;
}

// dA += the sum of its token blocks.
__device__ __forceinline__ void finish_da(float* da, i32 stride, const float* sums, int rank, int cols, int token_blocks,
                                          u32 i) {
    const u32 r = i / (cols / 4), n = i % (cols / 4) * 4;
    if (r >= (u32)rank) return;
    add_to(da + (i64)r * stride + n, sum_of(sums + (i64)r * cols + n, (i64)RANK * cols, token_blocks), 1.0f);
}

// dB += s diag(g) the sum of its token blocks, transposed; g ones if null.
__device__ __forceinline__ void finish_db(float* db, i32 stride, const float* sums, const float* g, float scaling, int rank,
                                          int cols, int token_blocks, u32 i) {
    const u32 r = i / cols * 4, n = i % cols;
    if (r >= (u32)rank) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* from = sums + (i64)r * cols + n;
#pragma unroll 4
    for (int k = 0; k < token_blocks; k++, from += (i64)RANK * cols)
        add(sum, make_float4(from[0], from[cols], from[2 * (i64)cols], from[3 * (i64)cols]));
    add_to(db + (i64)n * stride + r, sum, g ? scaling * g[n] : scaling);
}

// dscale += the sum of its token blocks / scale, nothing where scale is 0.
__device__ __forceinline__ void finish_scale(float* dscale, const float* scale, const float* sums, int cols,
                                             int token_blocks, u32 n) {
    if (n >= (u32)cols) return;
    double sum = 0.0;
#pragma unroll 8
    for (int k = 0; k < token_blocks; k++) sum += (double)sums[(i64)k * cols + n];
    const float factor = scale[n];
    if (factor != 0.0f) dscale[n] += (float)(sum / (double)factor);
}

// Row y of the grid does one of them: dh of gate and of up, dA, dB of gate and of up, and the factors of gate and of up.
extern "C" __global__ void __launch_bounds__(FINISHERS)
    swiglu_low_rank_finish(const float* dh_sums, const float* factor_sums, const float* scale_sums, bf16* gate_dh,
                           i32 gate_dh_stride, bf16* gate_twin, i32 gate_twin_stride, bf16* up_dh, i32 up_dh_stride,
                           bf16* up_twin, i32 up_twin_stride, float* da, i32 da_stride, i32 da_rank, float* gate_db,
                           i32 gate_db_stride, const float* gate_g, float gate_scaling, i32 gate_rank, float* up_db,
                           i32 up_db_stride, const float* up_g, float up_scaling, i32 up_rank, float* gate_dscale,
                           const float* gate_scale, float* up_dscale, const float* up_scale, i32 tokens, i32 cols,
                           i32 column_blocks, i32 token_blocks) {
    const u32 i = blockIdx.x * FINISHERS + threadIdx.x;
    const float* const up_dh_sums = dh_sums + (i64)column_blocks * tokens * RANK;
    const i64 factor = (i64)token_blocks * RANK * cols;
    switch (blockIdx.y) {
    case 0:
        return finish_dh(gate_dh, gate_dh_stride, gate_twin, gate_twin_stride, dh_sums, gate_rank, tokens, column_blocks,
                         i);
    case 1:
        return finish_dh(up_dh, up_dh_stride, up_twin, up_twin_stride, up_dh_sums, up_rank, tokens, column_blocks, i);
    case 2: return finish_da(da, da_stride, factor_sums, da_rank, cols, token_blocks, i);
    case 3:
        return finish_db(gate_db, gate_db_stride, factor_sums + factor, gate_g, gate_scaling, gate_rank, cols,
                         token_blocks, i);
    case 4:
        return finish_db(up_db, up_db_stride, factor_sums + 2 * factor, up_g, up_scaling, up_rank, cols, token_blocks, i);
    case 5: return finish_scale(gate_dscale, gate_scale, scale_sums, cols, token_blocks, i);
    default:
        return finish_scale(up_dscale, up_scale, scale_sums + (i64)token_blocks * cols, cols, token_blocks, i);
    }
}
