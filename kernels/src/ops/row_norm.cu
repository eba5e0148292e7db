// The length of every row of W + s B A, once per optimizer step, from |W|^2 and one pass over W.
//
// |W + s B A|^2 = |W|^2 + 2 s W . (B A) + s^2 |B A|^2, in one of two ways, both with mma.sync (sm_80 and newer).
//
// Up to rank 16, where rows are whole 64 bytes: from the products W A^T and A A^T, which take a few instructions per
// kilobyte of W (`forward_products`, at the end).
//
// For any other: a block makes 32 rows of B A, 64 columns per warp at a time, in registers, multiplies them there with
// W and with themselves, and keeps two sums per row. B enters as the sum of two bf16, which is 16 bits of it; A and W
// are bf16 already.
//
// Operands come from memory 16 bytes per lane without a detour through shared memory, because the columns of a product
// may be numbered at will: column n of tile j of a piece is its column 8 (n / 2) + 32 (n % 2) + j. So the eight columns
// that a lane loads of W are those where the eight tiles of B A put its results, and the eight that it loads of A are
// those that it feeds into the eight tiles.

// Below this part of |W|^2 + s^2 |B A|^2 the factored square is not trusted.
constexpr double CANCELLATION = 1e-3;

// Rows of a block, as two tiles of 16, and columns of a piece.
constexpr int ROWS = 32, PIECE = 64;
// Ranks that a product sums over, and how many of these groups of B a block keeps in shared memory.
constexpr u32 GROUP = 16, KEPT = 8;
constexpr int MOST_WARPS = 16;

// c (16 x 8, f32) += a (16 x 16) b (16 x 8).
__device__ __forceinline__ void mma(float (&c)[4], uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Sixteen bytes that nobody reads again: they leave the first cache to A.
__device__ __forceinline__ uint4 load_once(const bf16* p) {
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(p));
    return x;
}

// The same of what many blocks read.
__device__ __forceinline__ uint4 load_shared_by_all(const bf16* p) {
    uint4 x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

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

// The matrices, row-major.
struct Matrices {
    const float* b;
    const bf16 *a, *w;
    u32 b_stride, a_stride, w_stride;
    u32 rows, cols, rank;
};

// Adds to `sums` (of rows 16 i + g and 16 i + g + 8 of the block, g = lane / 4) the columns that this lane has to add.
// ONE: the rank is at most that of one group.
template <bool ALIGNED, bool ONE>
__device__ __forceinline__ void add_columns(Sums (&sums)[2][2], const Matrices& x, uint4 (&kept)[KEPT][2][2][32]) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, top = blockIdx.x * ROWS;
    const u32 g = lane / 4, t = lane % 4, groups = ONE ? 1 : max(1u, (x.rank + GROUP - 1) / GROUP);
    const i32 cols = x.cols;

    i32 k = warp * PIECE;
    uint4 w[2][2][2], first[4];
    const auto load_w = [&](u32 i, i32 k) {
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            // A row past the last is a copy of the last, and not written.
            const bf16* row = x.w + (u64)min(top + i * 16 + j * 8 + g, x.rows - 1) * x.w_stride;
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const i32 col = k + h * 32 + t * 8;
                w[i][j][h] = load_present<ALIGNED, true>(row + col, cols - col);
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
                for (u32 h = 0; h < 2; h++) sums[i][j].add(w[i][j][h], ba, j * 2 + h);
            // The next piece is under way while this one is worked on.
            load_w(i, k + warps * PIECE);
        }
        load_a(first, 0, k + warps * PIECE);
    }
}

// The sum over neighbouring `lanes`, a power of two.
__device__ __forceinline__ double sum_over(double x, u32 lanes) {
    for (u32 d = lanes / 2; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// |W + s B A|^2 of a row, from the row itself, by a warp. `per_g`: what the row of `w` is to be multiplied by.
__device__ __forceinline__ double measure(const Matrices& x, u32 row, double per_g, double s) {
    double square = 0.0;
    for (u32 k = threadIdx.x % 32; k < x.cols; k += 32) {
        double low_rank = 0.0;
        for (u32 r = 0; r < x.rank; r++)
            low_rank += (double)x.b[(u64)row * x.b_stride + r] * to_f32(x.a[(u64)r * x.a_stride + k]);
        const double sum = to_f32(x.w[(u64)row * x.w_stride + k]) * per_g + s * low_rank;
        square += sum * sum;
    }
    return sum_over(square, 32);
}

// A row of the result, and what the lanes that share it read of it before one of them writes.
struct Row {
    u32 index;
    bool exists;
    double own, per_g;
    float magnitude;
};

// A row past the last is a copy of the last, and not written.
__device__ __forceinline__ Row read_row(u32 index, u32 rows, const float* w_squared, const float* folded,
                                        const float* m) {
    Row row;
    row.exists = index < rows;
    row.index = min(index, rows - 1);
    row.own = w_squared[row.index];
    // Rows that are multiplied by g already are divided by it; one of g = 0 tells nothing of W.
    const float old_g = folded == nullptr ? 1.0f : folded[row.index];
    row.per_g = old_g == 0.0f ? 0.0 : 1.0 / old_g;
    row.magnitude = m == nullptr ? 0.0f : m[row.index];
    return row;
}

// What a kernel writes: norm = sqrt(|W|^2 + 2 s W . (B A) + s^2 |B A|^2); and, where `g` is given, what is folded with
// it: g = m / norm, 0 where the norm is 0, and folded_b = s diag(g) B.
struct Results {
    float *norm, *g;
    bf16* folded_b;
    i64 folded_b_stride;
    float scaling;

    // By a warp, of which neighbouring `lanes` (a power of two) share a row and have the same sums: cross = W . (B A),
    // low_rank = |B A|^2. Rows that B A nearly cancels are built and measured.
    __device__ __forceinline__ void write(const Matrices& x, const Row& row, u32 lanes, double cross,
                                          double low_rank) const {
        const u32 lane = threadIdx.x % 32, part = lane % lanes;
        const double s = scaling;
        low_rank *= s * s;
        double square = row.own + 2.0 * s * cross + low_rank;
        const bool cancels = square < CANCELLATION * (row.own + low_rank) || square < 0.0;
        const u32 near = __ballot_sync(0xffffffffu, row.exists && cancels);
        for (u32 first = 0; near != 0 && first < 32; first += lanes) {
            if ((near >> first & 1) == 0) continue;
            const double measured = measure(x, __shfl_sync(0xffffffffu, row.index, first),
                                            __shfl_sync(0xffffffffu, row.per_g, first), s);
            if (lane / lanes == first / lanes) square = measured;
        }
        if (!row.exists) return;
        const float length = (float)sqrt(square);
        if (part == 0) norm[row.index] = length;
        if (g == nullptr) return;
        const float factor = length == 0.0f ? 0.0f : row.magnitude / length;
        if (part == 0) g[row.index] = factor;
        for (u32 q = part; q < x.rank; q += lanes)
            folded_b[row.index * folded_b_stride + q] =
                to_bf16(scaling * factor * x.b[(u64)row.index * x.b_stride + q]);
    }
};

// By way of B A. `out.g` may be `folded`. `x.w` are the rows of W, multiplied by `folded` if that is given. Blocks of 8
// or 16 warps.
template <bool ALIGNED, bool ONE>
__device__ __forceinline__ void forward(const Results& out, const float* w_squared, const Matrices& x,
                                        const float* folded, const float* m) {
    __shared__ uint4 kept[KEPT][2][2][32];
    __shared__ float partial[2][ROWS][MOST_WARPS + 1];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    Sums sums[2][2] = {};
    add_columns<ALIGNED, ONE>(sums, x, kept);
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
    out.write(x, row, warps, sum_over(partial[0][row_of_block][part], warps) * row.per_g,
              sum_over(partial[1][row_of_block][part], warps));
}

// ---------------------------------------------------------------------------------- products, up to rank 16
//
// W . (B A) = sum_r b_r (W A^T)_r and |B A|^2 = b (A A^T) b^T. A block takes 8 TILES rows, its warps the columns in
// turn, and their products are added in the end, warp by warp. Columns may be summed in any order here too: the 16
// bytes that a lane loads, of each of its rows, are its share of two products of 16 columns. W is the right operand (of
// 8 rows), whose registers are those of a load.

// Columns of a load: 16 bytes from each of four lanes.
constexpr u32 LOAD = 32;

// The first cache is not asked; the second fetches what is needed when the products are made.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What the compiler has to keep in registers from here on, instead of finding it anew from what it came from.
__device__ __forceinline__ void keep(const bf16*& p, u32& x) { asm volatile("" : "+l"(p), "+r"(x)); }

// Rows `first`, `first` + 8, .. of a matrix; a row past the last is a copy of one before it.
struct Rows {
    const bf16* start;
    // `last`: 16 times the number of rows behind the first.
    u32 stride, last;

    __device__ __forceinline__ Rows(const bf16* matrix, u32 stride, u32 rows, u32 first) : stride(stride) {
        first = min(first, rows - 1);
        start = matrix + (u64)first * stride;
        last = (rows - 1 - first) / 8 * 16;
    }

    __device__ __forceinline__ const bf16* row(u32 i, u32 col) const {
        const u64 bytes = (u64)min(i * 16, last) * stride;
        return reinterpret_cast<const bf16*>(reinterpret_cast<const char*>(start + col) + bytes);
    }
};

// 32 columns of a block's rows of W and of the rows of A: a lane has rows g, g + 8, .. (g = lane / 4), and of them the
// eight columns that start at 8 (lane % 4). Products of rows past the last are not used.
template <u32 TILES> struct Columns {
    uint4 w[TILES], a[2];

    __device__ __forceinline__ void load(const Rows& w_rows, const Rows& a_rows, u32 col) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) a[i] = load_shared_by_all(a_rows.row(i, col));
#pragma unroll
        for (u32 i = 0; i < TILES; i++) w[i] = load_once(w_rows.row(i, col));
    }

    // Tile i of `products` += A W^T of tile i of W, and the last two += A A^T.
    __device__ __forceinline__ void multiply(float (&products)[TILES + 2][4]) const {
        // One half after the other: its left operand stays where it was put together.
        const uint4 first = make_uint4(a[0].x, a[1].x, a[0].y, a[1].y);
#pragma unroll
        for (u32 i = 0; i < TILES + 2; i++) {
            const uint4 right = i < TILES ? w[i] : a[i - TILES];
            mma(products[i], first, right.x, right.y);
        }
        const uint4 second = make_uint4(a[0].z, a[1].z, a[0].w, a[1].w);
#pragma unroll
        for (u32 i = 0; i < TILES + 2; i++) {
            const uint4 right = i < TILES ? w[i] : a[i - TILES];
            mma(products[i], second, right.z, right.w);
        }
    }
};

// Where element (r, row) of tiles of 8 rows lies when every lane has stored what it has of each.
__device__ __forceinline__ u32 place(u32 r, u32 row) {
    const u32 lane = r % 8 * 4 + row % 8 / 2;
    return (row / 8 * 32 + lane) * 4 + r / 8 * 2 + row % 2;
}

// 4 f32 per lane of each of TILES + 2 tiles, of every warp.
extern __shared__ __align__(128) unsigned char shared[];

// As `forward`, for aligned rows of whole LOADs and ranks 1 to 16. DEPTH: loads of a lane under way. Blocks of 8 or 16
// warps.
template <u32 TILES, u32 DEPTH>
__device__ __forceinline__ void forward_products(const Results& out, const float* w_squared, const Matrices& x,
                                                 const float* folded, const float* m) {
    constexpr u32 ROWS_OF_BLOCK = TILES * 8, PASSES = (TILES + 1) / 2, SHARE = (TILES + 2) * 32;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const u32 top = blockIdx.x * ROWS_OF_BLOCK;
    // Half a warp shares a row in the end; passes beyond the rows of a block (of 16 warps) do nothing.
    const u32 part = lane % 16, row_of_pass = threadIdx.x / 16, rows_of_pass = warps * 2;

    Rows w_rows(x.w + lane % 4 * 8, x.w_stride, x.rows, top + lane / 4);
    Rows a_rows(x.a + lane % 4 * 8, x.a_stride, x.rank, lane / 4);
    // More tiles leave no registers for that.
    if constexpr (TILES <= 2) {
        keep(w_rows.start, w_rows.last);
        keep(a_rows.start, a_rows.last);
    }
    Columns<TILES> columns[DEPTH];
    // Two loads of a warp are neighbours: together they are the 128 bytes of a row that memory hands out best.
    const auto col = [&](u32 load) { return (load / 2 * warps + warp) * (2 * LOAD) + load % 2 * LOAD; };
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++)
        if (col(d) < x.cols) columns[d].load(w_rows, a_rows, col(d));
    for (u32 i = threadIdx.x; i < ROWS_OF_BLOCK && top + i < x.rows; i += blockDim.x) {
        prefetch(x.b + (u64)(top + i) * x.b_stride);
        prefetch(w_squared + top + i);
        if (folded != nullptr) prefetch(folded + top + i);
        if (m != nullptr) prefetch(m + top + i);
    }

    float products[TILES + 2][4] = {};
#pragma unroll 1
    for (u32 first = 0; col(first) < x.cols; first += DEPTH) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            if (col(first + d) >= x.cols) break;
            columns[d].multiply(products);
            // The next columns are under way while these are worked on.
            const u32 next = col(first + d + DEPTH);
            if (next < x.cols) columns[d].load(w_rows, a_rows, next);
        }
    }

    float4* sums = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (u32 i = 0; i < TILES + 2; i++)
        sums[warp * SHARE + i * 32 + lane] =
            make_float4(products[i][0], products[i][1], products[i][2], products[i][3]);
    // All is read of the rows before anything is written.
    Row rows[PASSES];
    float own_b[PASSES];
#pragma unroll
    for (u32 i = 0; i < PASSES; i++) {
        const u32 row = i * rows_of_pass + row_of_pass;
        rows[i] = read_row(top + row, x.rows, w_squared, folded, m);
        own_b[i] = part < x.rank ? x.b[(u64)rows[i].index * x.b_stride + part] : 0.0f;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < SHARE; i += blockDim.x) {
        float4 sum = sums[i];
        for (u32 other = 1; other < warps; other++) {
            const float4 c = sums[other * SHARE + i];
            sum = make_float4(sum.x + c.x, sum.y + c.y, sum.z + c.z, sum.w + c.w);
        }
        sums[i] = sum;
    }
    __syncthreads();

    const float* sum = reinterpret_cast<const float*>(shared);
    float gram[16];
#pragma unroll
    for (u32 r = 0; r < 16; r++) gram[r] = r < x.rank && part < x.rank ? sum[place(r, ROWS_OF_BLOCK + part)] : 0.0f;
#pragma unroll
    for (u32 i = 0; i < PASSES; i++) {
        const u32 row = i * rows_of_pass + row_of_pass;
        if (row >= ROWS_OF_BLOCK) break;
        float of_gram = 0.0f;
#pragma unroll
        for (u32 r = 0; r < 16; r++) of_gram += gram[r] * __shfl_sync(0xffffffffu, own_b[i], lane / 16 * 16 + r);
        const float of_w = part < x.rank ? sum[place(part, row)] : 0.0f;
        const double cross = sum_over((double)of_w * own_b[i], 16) * rows[i].per_g;
        out.write(x, rows[i], 16, cross, sum_over((double)of_gram * own_b[i], 16));
    }
}

#define KERNEL(NAME, FORWARD)                                                                                          \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32, 1)                                                   \
        NAME(float* norm, const float* w_squared, const bf16* a, i32 a_stride, const float* b, i32 b_stride,           \
             const bf16* w, i32 w_stride, const float* folded, const float* m, float* g, bf16* folded_b,               \
             i32 folded_b_stride, float scaling, i32 rows, i32 cols, i32 rank) {                                       \
        const Matrices x = {b,         a,         w,        (u32)b_stride, (u32)a_stride, (u32)w_stride,               \
                            (u32)rows, (u32)cols, (u32)rank};                                                          \
        const Results out = {norm, g, folded_b, folded_b_stride, scaling};                                             \
        FORWARD(out, w_squared, x, folded, m);                                                                         \
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
