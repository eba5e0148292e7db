// The length of every row of W + s B A, once per optimizer step, from |W|^2 and one pass over W.
//
// |W + s B A|^2 = |W|^2 + 2 s W . (B A) + s^2 |B A|^2, in one of two ways, both with mma.sync (sm_80 and newer).
//
// Up to rank 16, where rows are whole 64 bytes: from the products W A^T and A A^T, which take a few instructions per
// kilobyte of W (`products.cuh`).
//
// For any other: a block makes 32 rows of B A, 64 columns per warp at a time, in registers, multiplies them there with
// W and with themselves, and keeps two sums per row. B enters as the sum of two bf16, which is 16 bits of it; A and W
// are bf16 already.
//
// Operands come from memory 16 bytes per lane without a detour through shared memory, because the columns of a product
// may be numbered at will: column n of tile j of a piece is its column 8 (n / 2) + 32 (n % 2) + j. So the eight columns
// that a lane loads of W are those where the eight tiles of B A put its results, and the eight that it loads of A are
// those that it feeds into the eight tiles.

// Rows of a block, as two tiles of 16, and columns of a piece.
constexpr int ROWS = 32, PIECE = 64;
// Ranks that a product sums over, and how many of these groups of B a block keeps in shared memory.
constexpr u32 GROUP = 16, KEPT = 8;
constexpr int MOST_WARPS = 16;

// Eight elements from `p` on, of which `present` exist (none if not positive); the others are zeros. ALIGNED: `p` is
// aligned, and all exist or none.
template <bool ALIGNED, bool ONCE> __device__ __forceinline__ uint4 load_present(const bf16* p, i32 present) {
    if constexpr (ALIGNED) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (present > 0) x = ONCE ? load_once(p) : load_shared_by_all(p);
        return x;
    } else {
        u32 e[8];
#pragma unroll
        for (int i = 0; i < 8; i++) e[i] = i < present ? p[i].bits : 0;
        return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
    }
}

template <int J> __device__ __forceinline__ u32 word(uint4 x) {
    return J == 0 ? x.x : J == 1 ? x.y : J == 2 ? x.z : x.w;
}

// A left operand as the sum of two.
struct Split {
    uint4 high, low;
};

__device__ __forceinline__ void split(float x, float y, u32& high, u32& low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - low_f32(high), y - high_f32(high));
}

// Sixteen rows of B from `top` on at ranks `first` .. first + 16; a row past the last is a copy of the last.
__device__ __forceinline__ Split split_b(const float* b, u32 stride, u32 top, u32 rows, u32 first, u32 rank) {
    const u32 lane = threadIdx.x % 32;
    float x[4][2];
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 row = min(top + lane / 4 + i % 2 * 8, rows - 1), r = first + lane % 4 * 2 + i / 2 * 8 + j;
            x[i][j] = r < rank ? b[(u64)row * stride + r] : 0.0f;
        }
    Split s;
    split(x[0][0], x[0][1], s.high.x, s.low.x);
    split(x[1][0], x[1][1], s.high.y, s.low.y);
    split(x[2][0], x[2][1], s.high.z, s.low.z);
    split(x[3][0], x[3][1], s.high.w, s.low.w);
    return s;
}

// Tiles 2 J and 2 J + 1 of B A += 16 ranks of it.
template <int J> __device__ __forceinline__ void add_pair(float (&ba)[8][4], const Split& b, const uint4 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 halves = i == 0 ? 0x5410u : 0x7632u;
        const u32 b0 = __byte_perm(word<J>(a[0]), word<J>(a[1]), halves);
        const u32 b1 = __byte_perm(word<J>(a[2]), word<J>(a[3]), halves);
        mma(ba[2 * J + i], b.high, b0, b1);
        mma(ba[2 * J + i], b.low, b0, b1);
    }
}

// What the two sums of a row have so far.
struct Sums {
    float cross, low_rank;

    // `w`: eight columns of W; those of B A are number `at` of what a lane has of each tile.
    __device__ __forceinline__ void add(uint4 w, const float (&ba)[8][4], int at) {
        const f32x8 x = unpack8(w);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            cross += x.v[j] * ba[j][at];
            low_rank += ba[j][at] * ba[j][at];
        }
    }
};

// Adds to `sums` (of rows 16 i + g and 16 i + g + 8 of the block, g = lane / 4) the columns that this lane has to add.
// ONE: the rank is at most that of one group.
template <bool ALIGNED, bool ONE>
__device__ __forceinline__ void add_columns(Sums (&sums)[2][2], const Bf16Rows& w, const Factors& x, uint4 (&kept)[KEPT][2][2][32]) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, top = blockIdx.x * ROWS;
    const u32 g = lane / 4, t = lane % 4, groups = ONE ? 1 : max(1u, (x.rank + GROUP - 1) / GROUP);
    const i32 cols = x.cols;

    i32 k = warp * PIECE;
    uint4 pieces[2][2][2], first[4];
    const auto load_w = [&](u32 i, i32 k) {
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            // A row past the last is a copy of the last, and not written.
            const bf16* row = w.w + (u64)min(top + i * 16 + j * 8 + g, x.rows - 1) * w.stride;
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const i32 col = k + h * 32 + t * 8;
                pieces[i][j][h] = load_present<ALIGNED, true>(row + col, cols - col);
            }
        }
    };
    const auto load_a = [&](uint4 (&a)[4], u32 group, i32 k) {
        const i32 col = k + g / 2 * 8 + g % 2 * 32;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 r = group * GROUP + t * 2 + i / 2 * 8 + i % 2;
            a[i] = load_present<ALIGNED, false>(x.a + (u64)r * x.a_stride + col, r < x.rank ? cols - col : 0);
        }
    };
    load_w(0, k);
    load_w(1, k);
    load_a(first, 0, k);
    for (u32 p = warp; p < 2 * min(groups, KEPT); p += warps) {
        const Split s = split_b(x.b, x.b_stride, top + p % 2 * 16, x.rows, p / 2 * GROUP, x.rank);
        kept[p / 2][p % 2][0][lane] = s.high;
        kept[p / 2][p % 2][1][lane] = s.low;
    }
    __syncthreads();
#pragma unroll 1
    for (; k < cols; k += warps * PIECE) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float ba[8][4] = {};
            const auto add_group = [&](u32 group, const uint4 (&a)[4]) {
                const Split b = group < KEPT ? Split{kept[group][i][0][lane], kept[group][i][1][lane]}
                                             : split_b(x.b, x.b_stride, top + i * 16, x.rows, group * GROUP, x.rank);
                add_pair<0>(ba, b, a);
                add_pair<1>(ba, b, a);
                add_pair<2>(ba, b, a);
                add_pair<3>(ba, b, a);
            };
            add_group(0, first);
#pragma unroll 1
            for (u32 group = 1; group < groups; group++) {
                uint4 a[4];
                load_a(a, group, k);
                add_group(group, a);
            }
#pragma unroll
            for (u32 j = 0; j < 2; j++)
#pragma unroll
                for (u32 h = 0; h < 2; h++) sums[i][j].add(pieces[i][j][h], ba, j * 2 + h);
            // The next piece is under way while this one is worked on.
            load_w(i, k + warps * PIECE);
        }
        load_a(first, 0, k + warps * PIECE);
    }
}

// By way of B A. `out.g` may be `folded`. W are the rows, multiplied by `folded` if that is given. Blocks of 8
// or 16 warps.
template <bool ALIGNED, bool ONE>
__device__ __forceinline__ void forward(const Results& out, const float* w_squared, const Bf16Rows& w, const Factors& x,
                                        const float* folded, const float* m) {
    __shared__ uint4 kept[KEPT][2][2][32];
    __shared__ float partial[2][ROWS][MOST_WARPS + 1];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    Sums sums[2][2] = {};
    add_columns<ALIGNED, ONE>(sums, w, x, kept);
    // As many lanes as there are warps share a row now.
    const u32 row_of_block = threadIdx.x / warps, part = threadIdx.x % warps;
    const Row row = read_row(blockIdx.x * ROWS + row_of_block, x.rows, w_squared, folded, m);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float cross = sums[i / 2][i % 2].cross, low_rank = sums[i / 2][i % 2].low_rank;
#pragma unroll
        for (int d = 1; d < 4; d <<= 1) {
            cross += __shfl_xor_sync(0xffffffffu, cross, d);
            low_rank += __shfl_xor_sync(0xffffffffu, low_rank, d);
        }
        if (lane % 4 == 0) {
            partial[0][i * 8 + lane / 4][warp] = cross;
            partial[1][i * 8 + lane / 4][warp] = low_rank;
        }
    }
    __syncthreads();
    out.write(w, x, row, warps, sum_over(partial[0][row_of_block][part], warps) * row.per_g,
              sum_over(partial[1][row_of_block][part], warps));
}

#define KERNEL(NAME, FORWARD)                                                                                          \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32, 1)                                                   \
        NAME(float* norm, const float* w_squared, const bf16* a, i32 a_stride, const float* b, i32 b_stride,           \
             const bf16* w, i32 w_stride, const float* folded, const float* m, float* g, bf16* folded_b,               \
             i32 folded_b_stride, float scaling, i32 rows, i32 cols, i32 rank) {                                       \
        const Factors x = {b, a, (u32)b_stride, (u32)a_stride, (u32)rows, (u32)cols, (u32)rank};                       \
        const Results out = {norm, g, folded_b, folded_b_stride, scaling};                                             \
        FORWARD(out, w_squared, Bf16Rows{w, (u32)w_stride}, x, folded, m);                                                                      \
    }

// Rows of a and w that do not start at a multiple of 16 bytes, or are not whole 16 bytes long.
KERNEL(row_norm_forward, (forward<false, false>))
KERNEL(row_norm_forward_aligned, (forward<true, false>))
// Of a rank up to 16.
KERNEL(row_norm_forward_aligned_r16, (forward<true, true>))
// Of a rank from 1 to 16 and aligned rows of a multiple of 32 columns; the number is that of a block's rows.
KERNEL(row_norm_products_16, (forward_products<2, 4>))
KERNEL(row_norm_products_32, (forward_products<4, 3>))
KERNEL(row_norm_products_56, (forward_products<7, 2>))
