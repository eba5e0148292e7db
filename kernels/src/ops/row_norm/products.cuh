// Norms of rows by the products W A^T and A A^T, up to rank 16, of rows of W in bf16 and of packed ones.
//
// |W + s B A|^2 = |W|^2 + 2 s W . (B A) + s^2 |B A|^2, and W . (B A) = sum_r b_r (W A^T)_r, |B A|^2 = b (A A^T) b^T, with
// mma.sync (sm_80 and newer). A block takes 8 TILES rows, its warps the columns in turn, and their products are added in the
// end, warp by warp. Columns may be summed in any order: the eight that a lane loads, of each of its rows, are its share of
// two products of 16 columns. W is the right operand (of 8 rows), whose registers are those of a load of bf16.

// Below this part of |W|^2 + s^2 |B A|^2 the factored square is not trusted.
constexpr double CANCELLATION = 1e-3;

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

// The factors of the adapter, row-major, and the shape.
struct Factors {
    const float* b;
    const bf16* a;
    u32 b_stride, a_stride;
    u32 rows, cols, rank;
};

// The sum over neighbouring `lanes`, a power of two.
__device__ __forceinline__ double sum_over(double x, u32 lanes) {
    for (u32 d = lanes / 2; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// |W + s B A|^2 of a row, from the row itself, by a warp. `per_g`: what the row of W is to be multiplied by.
template <class W> __device__ __forceinline__ double measure(const W& w, const Factors& x, u32 row, double per_g, double s) {
    double square = 0.0;
    for (u32 k = threadIdx.x % 32; k < x.cols; k += 32) {
        double low_rank = 0.0;
        for (u32 r = 0; r < x.rank; r++)
            low_rank += (double)x.b[(u64)row * x.b_stride + r] * to_f32(x.a[(u64)r * x.a_stride + k]);
        const double sum = w.element(row, k) * per_g + s * low_rank;
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
    template <class W>
    __device__ __forceinline__ void write(const W& w, const Factors& x, const Row& row, u32 lanes, double cross,
                                          double low_rank) const {
        const u32 lane = threadIdx.x % 32, part = lane % lanes;
        const double s = scaling;
        low_rank *= s * s;
        double square = row.own + 2.0 * s * cross + low_rank;
        const bool cancels = square < CANCELLATION * (row.own + low_rank) || square < 0.0;
        const u32 near = __ballot_sync(0xffffffffu, row.exists && cancels);
        for (u32 first = 0; near != 0 && first < 32; first += lanes) {
            if ((near >> first & 1) == 0) continue;
            const double measured = measure(w, x, __shfl_sync(0xffffffffu, row.index, first),
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

// W in bf16, and the rows of it that a lane reads, eight elements at a time.
struct Bf16Rows {
    static constexpr bool DECODES = false;
    using Raw = uint4;
    const bf16* w;
    u32 stride;

    __device__ __forceinline__ float element(u32 row, u32 col) const { return to_f32(w[(u64)row * stride + col]); }

    struct Lane {
        Rows rows;

        __device__ __forceinline__ Lane(const Bf16Rows& w, u32 rows, u32 first, u32 part)
            : rows(w.w + part * 8, w.stride, rows, first) {}

        __device__ __forceinline__ Raw load(u32 i, u32 col) const { return load_once(rows.row(i, col)); }

        __device__ __forceinline__ uint4 values(const Raw& raw, u32, u32) const { return raw; }

        __device__ __forceinline__ void keep_in_registers() { keep(rows.start, rows.last); }
    };
};

// 32 columns of a block's rows of W and of the rows of A: a lane has rows g, g + 8, .. (g = lane / 4), and of them the
// eight columns that start at 8 (lane % 4). Products of rows past the last are not used.
template <class W, u32 TILES> struct Columns {
    typename W::Raw w[TILES];
    uint4 a[2];

    __device__ __forceinline__ void load(const typename W::Lane& w_rows, const Rows& a_rows, u32 col) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) a[i] = load_shared_by_all(a_rows.row(i, col));
#pragma unroll
        for (u32 i = 0; i < TILES; i++) w[i] = w_rows.load(i, col);
    }

    // Tile i of `products` += A W^T of tile i of W, and the last two += A A^T.
    __device__ __forceinline__ void multiply(float (&products)[TILES + 2][4], const typename W::Lane& w_rows,
                                             u32 col) const {
        const uint4 first = make_uint4(a[0].x, a[1].x, a[0].y, a[1].y);
        const uint4 second = make_uint4(a[0].z, a[1].z, a[0].w, a[1].w);
        if constexpr (W::DECODES) {
            // What is decoded is used up at once.
#pragma unroll
            for (u32 i = 0; i < TILES + 2; i++) {
                const uint4 right = i < TILES ? w_rows.values(w[i], i, col) : a[i - TILES];
                mma(products[i], first, right.x, right.y);
                mma(products[i], second, right.z, right.w);
            }
        } else {
            // One half after the other: its left operand stays where it was put together.
#pragma unroll
            for (u32 i = 0; i < TILES + 2; i++) {
                const uint4 right = i < TILES ? w_rows.values(w[i], i, col) : a[i - TILES];
                mma(products[i], first, right.x, right.y);
            }
#pragma unroll
            for (u32 i = 0; i < TILES + 2; i++) {
                const uint4 right = i < TILES ? w_rows.values(w[i], i, col) : a[i - TILES];
                mma(products[i], second, right.z, right.w);
            }
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

// `out.g` may be `folded`; W are the rows multiplied by `folded`, if that is given. For aligned rows of whole LOADs and
// ranks 1 to 16. DEPTH: loads of a lane under way. Blocks of 8 or 16 warps.
template <u32 TILES, u32 DEPTH, class W>
__device__ __forceinline__ void forward_products(const Results& out, const float* w_squared, const W& w, const Factors& x,
                                                 const float* folded, const float* m) {
    constexpr u32 ROWS_OF_BLOCK = TILES * 8, PASSES = (TILES + 1) / 2, SHARE = (TILES + 2) * 32;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const u32 top = blockIdx.x * ROWS_OF_BLOCK;
    // Half a warp shares a row in the end; passes beyond the rows of a block (of 16 warps) do nothing.
    const u32 part = lane % 16, row_of_pass = threadIdx.x / 16, rows_of_pass = warps * 2;

    typename W::Lane w_rows(w, x.rows, top + lane / 4, lane % 4);
    Rows a_rows(x.a + lane % 4 * 8, x.a_stride, x.rank, lane / 4);
    // More tiles leave no registers for that.
    if constexpr (TILES <= 2) {
        w_rows.keep_in_registers();
        keep(a_rows.start, a_rows.last);
    }
    Columns<W, TILES> columns[DEPTH];
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
            columns[d].multiply(products, w_rows, col(first + d));
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
        out.write(w, x, rows[i], 16, cross, sum_over((double)of_gram * own_b[i], 16));
    }
}

