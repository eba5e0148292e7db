// The frame around the decoders of all packed types: which eight elements a thread decodes, and where they go.
//
// A group is eight neighbouring elements of a row, 16 bytes of bf16, so that a warp stores 512 neighbouring bytes.
// A decoder is a struct: `Raw` is what it reads for a group, `load` reads it, `decode` makes eight f32 of it. All
// loads of a thread are issued before the first is waited for. The bytes of a weight come in planes, which
// weight/device.rs lays out; every field of a plane that `load` reads at once is aligned to its size.
//
// Where the CPU codec rounds after each operation, so do decoders: products and sums are written with __fmul_rn and
// __fadd_rn, which the compiler never fuses, except where a product is exact and fusing changes nothing.

constexpr int THREADS = 256;

// Planes and numbers of a packed weight.
struct Packed {
    const u8* plane[4];
    const u8* table;   // what the codes stand for; copied to shared memory
    float offset;      // 4-bit, double quantization: mean of the scales
    i32 shift;         // 4-bit: log2 of the block size
    i32 nested_shift;  // 4-bit, double quantization: log2 of the blocks that share a scale
    i32 rounding;      // 4-bit: the type that elements are rounded to first
    u32 cols;
    u32 groups;        // of a row; the last may be partly beyond it
};

// What the values of a row are multiplied by.
struct Scaling {
    float factor;      // of the whole weight
    const float* row;  // g, or null
};

// What stands in the columns beyond the weight: zeros, and b from column `at` of them on.
struct Branch {
    const bf16* b;  // or null
    i64 stride;
    u32 rank, at;
};

// What stands in the rows below the weight: those of a, or none.
struct Below {
    const bf16* a;
    i64 stride;
    u32 rank;
};

// Quotients by a divisor that the host knows: n / d = (n * mul) >> (32 + shift) for n < 2^31.
struct Divisor {
    u32 by, mul, shift;

    __device__ __forceinline__ u32 of(u32 n) const { return by == 1 ? n : __umulhi(n, mul) >> shift; }
};

// Bytes that are read once.
template <typename T> __device__ __forceinline__ T stream(const u8* p) { return __ldcs(reinterpret_cast<const T*>(p)); }

// Bytes that neighbours read too.
template <typename T> __device__ __forceinline__ T neighbour(const u8* p) { return __ldg(reinterpret_cast<const T*>(p)); }

// Eight codes of up to eight bits, a byte each: those of the even elements, and those of the odd.
struct Codes {
    u32 even, odd;
};

// Eight codes of four bits in the order of their elements.
__device__ __forceinline__ Codes nibbles(u32 x) { return {x & 0x0f0f0f0fu, x >> 4 & 0x0f0f0f0fu}; }

// Eight codes of two bits.
__device__ __forceinline__ Codes crumbs(u32 x) {
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    return {x & 0x03030303u, x >> 2 & 0x03030303u};
}

// Eight codes of one bit.
__device__ __forceinline__ Codes bits(u32 x) {
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    return {x & 0x01010101u, x >> 1 & 0x01010101u};
}

// Codes of which `high` holds the bits from bit `at` on.
__device__ __forceinline__ Codes join(Codes low, Codes high, int at) {
    return {low.even | high.even << at, low.odd | high.odd << at};
}

// Byte j of x as f32, less `zero`: the byte becomes the mantissa of 2^23 + byte, which is exact, and so is the difference.
__device__ __forceinline__ float byte_value(u32 x, u32 j, float zero) {
    return __fsub_rn(__uint_as_float(__byte_perm(x, 0x4b000000u, 0x7540u | j)), 8388608.0f + zero);
}

__device__ __forceinline__ f32x8 values(Codes codes, float zero) {
    f32x8 x;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        x.v[2 * j] = byte_value(codes.even, j, zero);
        x.v[2 * j + 1] = byte_value(codes.odd, j, zero);
    }
    return x;
}

// Eight bytes in two's complement.
__device__ __forceinline__ f32x8 signed_bytes(uint2 x) {
    f32x8 y;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        y.v[j] = byte_value(x.x ^ 0x80808080u, j, 128.0f);
        y.v[j + 4] = byte_value(x.y ^ 0x80808080u, j, 128.0f);
    }
    return y;
}

__device__ __forceinline__ f32x8 times(f32x8 x, float by) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fmul_rn(x.v[j], by);
    return x;
}

__device__ __forceinline__ f32x8 plus(f32x8 x, float by) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fadd_rn(x.v[j], by);
    return x;
}

// scale * x - min. The products of the K-quants have at most 22 bits and are exact, so fusing changes no bit.
__device__ __forceinline__ f32x8 affine(f32x8 x, float scale, float min) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] = __fmaf_rn(scale, x.v[j], -min);
    return x;
}

template <class D> __device__ __forceinline__ void fill(u32* table, const Packed& p) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < D::TABLE; i += THREADS) table[i] = reinterpret_cast<const u32*>(p.table)[i];
    __syncthreads();
}

// What a thread reads for a group.
template <class D> struct Loaded {
    typename D::Raw raw;
    float gain;  // the row's g
};

template <class D>
__device__ __forceinline__ Loaded<D> load(const Packed& p, const Scaling& scaling, u32 row, u32 group) {
    return {D::load(p, row, group), scaling.row == nullptr ? 1.0f : __ldg(scaling.row + row)};
}

// `rounds_anyway`: the values end as bf16, so that rounding to it is left to the end where nothing comes between.
template <class D>
__device__ __forceinline__ f32x8 value(const Loaded<D>& loaded, const u32* table, const Packed& p,
                                       const Scaling& scaling, u32 row, u32 group, bool rounds_anyway) {
    f32x8 x = D::decode(loaded.raw, table, p, row, group);
    const bool scaled = scaling.factor != 1.0f || scaling.row != nullptr;
    D::round(x, p, rounds_anyway && !scaled);
    // One of the two may be 1, which changes no bit.
    if (scaled) x = times(times(x, scaling.factor), loaded.gain);
    return x;
}

// Eight columns from `col` on behind those of the weight; fewer may come before.
__device__ __forceinline__ f32x8 branch_values(const Branch& branch, u32 row, i32 col) {
    const bf16* b = branch.b + row * branch.stride;
    const i32 first = col - (i32)branch.at, rank = (i32)branch.rank;
    if (first >= 0 && first + 8 <= rank && ((u64)(b + first) & 15) == 0) return load8(b + first);
    f32x8 x;
#pragma unroll
    for (i32 j = 0; j < 8; j++) x.v[j] = (u32)(first + j) < (u32)rank ? to_f32(b[first + j]) : 0.0f;
    return x;
}

// out[i, k] = a[i, k] for the K columns of a, a group per thread: a few rows.
template <typename Out> __device__ __forceinline__ void copy_below(Out* out, i64 stride, const Below& below, u32 cols) {
    const u32 groups = (cols + 7) / 8;
    const bool wide = aligned16(out, stride) && aligned16(below.a, below.stride);
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < below.rank * groups; i += gridDim.x * THREADS) {
        const u32 row = i / groups, col = i % groups * 8;
        Out* to = out + row * stride + col;
        const bf16* a = below.a + row * below.stride + col;
        if (wide && col + 8 <= cols) {
            store8(to, load8(a));
        } else {
            for (u32 j = 0; j < 8 && col + j < cols; j++) to[j] = from_f32<Out>(to_f32(a[j]));
        }
    }
}

// out[i, k] = g[first + i] * (factor * w[first + i, k]) for k < K, then zeros and b up to `width` columns. Below them the
// rows of a, of K columns.
//
// Whole groups first, where rows are aligned; then what is left.
template <class D, typename Out>
__device__ __forceinline__ void dequantize(Out* out, i64 stride, const Packed& p, u32 first_row, u32 rows, u32 width,
                                           const Divisor& whole_groups, const Scaling& scaling, const Branch& branch,
                                           const Below& below) {
    // Rows in f32 are no part of a step.
    constexpr int N = sizeof(Out) == 2 ? D::IN_FLIGHT : 1;
    __shared__ u32 table[D::TABLE > 0 ? D::TABLE : 1];
    bool filled = D::TABLE == 0;
    const bool wide = aligned16(out, stride);
    const u32 total = wide ? rows * whole_groups.by : 0;
    for (u32 tile = blockIdx.x * (THREADS * N); tile < total; tile += gridDim.x * (THREADS * N)) {
        Loaded<D> loaded[N];
        u32 row[N], group[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            // Beyond the end threads do the last group again, and store the same bits in the same place.
            const u32 i = min(tile + n * THREADS + threadIdx.x, total - 1);
            row[n] = whole_groups.of(i);
            group[n] = i - row[n] * whole_groups.by;
            loaded[n] = load<D>(p, scaling, first_row + row[n], group[n]);
        }
        // After the first loads, so that they travel meanwhile.
        if (!filled) fill<D>(table, p);
        filled = true;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const f32x8 x = value(loaded[n], table, p, scaling, first_row + row[n], group[n], sizeof(Out) == 2);
            store8(out + row[n] * stride + 8 * group[n], x);
        }
    }
    if (below.rank > 0) copy_below(out + rows * stride, stride, below, p.cols);
    const u32 first_group = wide ? whole_groups.by : 0, edge = (width + 7) / 8 - first_group;
    if (edge == 0) return;
    if (!filled) fill<D>(table, p);
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < rows * edge; i += gridDim.x * THREADS) {
        const u32 row = first_row + i / edge, group = first_group + i % edge, col = 8 * group;
        f32x8 x;
        if (col + 8 > p.cols) x = branch_values(branch, row, (i32)col - (i32)p.cols);
        if (group < p.groups) {
            const f32x8 w = value(load<D>(p, scaling, row, group), table, p, scaling, row, group, sizeof(Out) == 2);
#pragma unroll
            for (u32 j = 0; j < 8; j++) x.v[j] = col + j < p.cols ? w.v[j] : x.v[j];
        }
        Out* to = out + (i / edge) * stride + col;
        if (wide && col + 8 <= width) {
            store8(to, x);
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                if (col + j < width) to[j] = from_f32<Out>(x.v[j]);
            }
        }
    }
}

// out[n] = sum over k of (factor * w[n, k])^2, a block per row: each thread sums its groups, then the block its threads.
template <class D>
__device__ __forceinline__ void row_norms_squared(float* out, const Packed& p, u32 rows, const Scaling& scaling) {
    __shared__ u32 table[D::TABLE > 0 ? D::TABLE : 1];
    if (D::TABLE > 0) fill<D>(table, p);
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum = 0.0f;
        for (u32 group = threadIdx.x; group < p.groups; group += THREADS) {
            const f32x8 x = value(load<D>(p, scaling, row, group), table, p, scaling, row, group, false);
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (8 * group + j < p.cols) part += x.v[j] * x.v[j];
            }
            sum += part;
        }
        sum = block_sum<THREADS>(sum);
        if (threadIdx.x == 0) out[row] = sum;
    }
}

// out[i, k] = factor * w[ids[i], k]: the rows of a table, a block per row.
template <class D>
__device__ __forceinline__ void embedding_forward(bf16* out, i64 stride, const Packed& p, const u32* ids, u32 tokens,
                                                  const Scaling& scaling) {
    __shared__ u32 table[D::TABLE > 0 ? D::TABLE : 1];
    if (D::TABLE > 0) fill<D>(table, p);
    const bool wide = aligned16(out, stride);
    for (u32 i = blockIdx.x; i < tokens; i += gridDim.x) {
        const u32 row = ids[i];
        for (u32 group = threadIdx.x; group < p.groups; group += THREADS) {
            const f32x8 x = value(load<D>(p, scaling, row, group), table, p, scaling, row, group, true);
            bf16* to = out + i * stride + 8 * group;
            if (wide && 8 * group + 8 <= p.cols) {
                store8(to, x);
                continue;
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                if (8 * group + j < p.cols) to[j] = to_bf16(x.v[j]);
            }
        }
    }
}

// Most types have no rounding of their own and no table.
template <int LOADS, int TABLE_WORDS = 0> struct Decoder {
    static constexpr int IN_FLIGHT = LOADS;
    static constexpr u32 TABLE = TABLE_WORDS;

    static __device__ __forceinline__ void round(f32x8&, const Packed&, bool) {}
};

#define PACKED_PARAMETERS                                                                                          \
    const u8 *plane0, const u8 *plane1, const u8 *plane2, const u8 *plane3, const u8 *table, float offset, i32 shift, \
        i32 nested_shift, i32 rounding, i32 cols
#define PACKED                                                                                             \
    {                                                                                                      \
        {plane0, plane1, plane2, plane3}, table, offset, shift, nested_shift, rounding, (u32)cols, ((u32)cols + 7) / 8 \
    }

#define DEQUANTIZE(name, D, Out)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        name(Out* out, i64 stride, PACKED_PARAMETERS, i32 first_row, i32 rows, i32 width, i32 mul,      \
             i32 quotient_shift, float factor, const float* g, const bf16* b, i64 b_stride, i32 rank, i32 at,       \
             const bf16* a, i64 a_stride, i32 below) {                                                             \
        dequantize<D, Out>(out, stride, PACKED, first_row, rows, width,                                            \
                           {(u32)cols / 8, (u32)mul, (u32)quotient_shift}, {factor, g},                              \
                           {b, b_stride, (u32)rank, (u32)at}, {a, a_stride, (u32)below});                          \
    }

// The kernels of a type: to bf16, to f32, chosen rows to bf16, and the squared lengths of the rows.
#define KERNELS(name, D)                                                                                            \
    DEQUANTIZE(dequantize_##name, D, bf16)                                                                          \
    DEQUANTIZE(dequantize_##name##_f32, D, float)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        embedding_forward_##name(bf16* out, i64 stride, PACKED_PARAMETERS, const u32* ids, i32 tokens,              \
                                 float factor) {                                                                    \
        embedding_forward<D>(out, stride, PACKED, ids, tokens, {factor, nullptr});                                  \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        row_norms_squared_##name(float* out, PACKED_PARAMETERS, i32 rows, float factor) {                           \
        row_norms_squared<D>(out, PACKED, rows, {factor, nullptr});                                                \
    }
