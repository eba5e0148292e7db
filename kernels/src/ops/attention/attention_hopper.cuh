// Attention over packed sequences on Hopper (sm_90a): what forward and backward share.
//
// Compiled once per head dimension: `attention_d128_hopper.cu` and its sibling define it; `mma.cuh`,
// `attention_common.cuh`, this file, `attention_hopper_forward.cuh` and `attention_hopper_backward.cuh` follow. A block
// is three warpgroups or four. One warp of the first keeps the copy engine busy: tiles of 64-column panels, 128 bytes a
// row, swizzled as the tensor cores read them, arrive in stages of shared memory, each behind a barrier for `full` and
// one for `empty`. The other warpgroups own 64 rows each of the block's tile and keep their sums in registers. No
// atomics.
//
// A tile's last rows may be those of the next sequence: their probabilities are 0, so they must be finite.

constexpr int THREADS = 384;
constexpr int PANELS = D / 64;

// What cuTensorMapEncodeTiled makes: boxes of 64 rows and 64 columns, 128-byte swizzle.
struct __align__(64) TensorMap {
    u64 words[16];
};

// ------------------------------------------------------------------------------------ instructions

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase last until `bytes` more have been copied.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool has_ended(u32 barrier, u32 parity) {
    u32 ended;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return ended;
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    while (!has_ended(barrier, parity)) {
    }
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Of 256 threads, 128 that wait and 128 that do not.
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_pass(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

template <int REGISTERS> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Between writing registers and a product that reads them.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses of sums across a begin or wait.
template <int N> __device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// c (64 x N, f32) = a b + (add ? c : 0) over 16 columns of a. a: 64 x 16 in shared memory or registers. b: the columns
// of the product are its rows, or, BY_ROWS, its columns.
template <bool BY_ROWS> __device__ __forceinline__ void multiply(float (&c)[32], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, %35; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "l"(a), "l"(b), "r"((int)add), "n"(BY_ROWS ? 1 : 0));
}

template <bool BY_ROWS>
__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(BY_ROWS ? 1 : 0));
}

template <bool BY_ROWS> __device__ __forceinline__ void multiply(float (&c)[64], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, %67; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "l"(a), "l"(b), "r"((int)add), "n"(BY_ROWS ? 1 : 0));
}

template <bool BY_ROWS>
__device__ __forceinline__ void multiply(float (&c)[64], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(BY_ROWS ? 1 : 0));
}

// ------------------------------------------------------------------------------------ tiles in shared memory

__device__ constexpr u32 tile_bytes(int rows) { return rows * D * 2; }

// Copies ROWS rows of a head; rows behind the end of the matrix become zeros.
template <int ROWS>
__device__ __forceinline__ void copy_tile(u32 tile, const TensorMap* map, int head, int row, u32 barrier) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
        for (int r = 0; r < ROWS; r += 64)
            copy_box(tile + panel * ROWS * 128 + r * 128, map, head * D + panel * 64, row + r, barrier);
}

// How the tensor cores find 8 x 8 blocks: `panels` bytes between 64-column panels, 1024 between groups of 8 rows.
__device__ __forceinline__ u64 described(u32 address, u32 panels) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(panels >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// c = a b^T over the head dimension: 64 rows of a tile of A rows, all N rows of a tile of N = 2 R rows.
template <int A, int R>
__device__ __forceinline__ void scores(float (&c)[R], u32 a, u32 b) {
    const u64 left = described(a, 0), right = described(b, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        multiply<false>(c, left + (k / 4 * A * 128 + k % 4 * 32) / 16, right + (k / 4 * 2 * R * 128 + k % 4 * 32) / 16,
                        k > 0);
}

// sum (+)= p x: p packed from 64 x 4 K scores, x's 4 K rows the columns of p.
template <int K>
__device__ __forceinline__ void mix(float (&sum)[D / 2], const u32 (&p)[K], u32 x, bool add) {
    const u64 right = described(x, 4 * K * 128);
#pragma unroll
    for (int k = 0; k < K / 4; k++) {
        const u32 left[4] = {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]};
        multiply<true>(sum, left, right + k * 2048 / 16, add || k > 0);
    }
}

// Element i of a thread's scores or sums stands in row row_of(i) of its warp's 16, column column_of(i).
__device__ __forceinline__ int row_of(int i) { return i / 2 % 2 * 8 + lane_id() / 4; }
__device__ __forceinline__ int column_of(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }

// Rounds the sums of a warp's 16 rows and writes those before `rows`.
__device__ __forceinline__ void store_rows(bf16* y, i64 stride, int rows, const float (&sum)[D / 2],
                                           const float (&factor)[2]) {
    const int lane = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = r * 8 + lane_id() / 4;
        bf16* to = y + row * stride + lane * 8;
#pragma unroll
        for (int n = 0; n < D / 8; n += 4) {
            // Four threads hold a pair each of four groups of eight columns; each gets a whole group.
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = pack_bf16(sum[(n + j) * 4 + 2 * r] * factor[r], sum[(n + j) * 4 + 2 * r + 1] * factor[r]);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const u32 other = __shfl_xor_sync(0xffffffffu, lane & 1 ? x[j] : x[j + 1], 1);
                if (lane & 1) x[j] = other;
                else x[j + 1] = other;
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 other = __shfl_xor_sync(0xffffffffu, lane & 2 ? x[j] : x[j + 2], 2);
                if (lane & 2) x[j] = other;
                else x[j + 2] = other;
            }
            if (row < rows) *reinterpret_cast<uint4*>(to + n * 8) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

// A stage of a ring and the parity of its use.
template <int STAGES> struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

extern __shared__ __align__(1024) unsigned char tiles[];
