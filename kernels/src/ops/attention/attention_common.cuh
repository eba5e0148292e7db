// Attention over packed sequences: what the portable kernels and those for Hopper share.
//
// HEAD_DIM is defined by the file before.

constexpr int D = HEAD_DIM;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
#define HIDDEN __int_as_float(0xff800000)

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

__device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ------------------------------------------------------------------------------------ where a block works

struct Place {
    int sequence, start, length, tile, tiles;
};

// The tiles of sequence s, each ROWS of its tokens, have the slots from starts[s] / ROWS + s on; so the number of
// slots, tokens / ROWS + sequences, is known without the starts, and few slots are empty.
template <int ROWS>
__device__ __forceinline__ bool find_place(Place& place, const u32* starts, int n_sequences, int slot) {
    int first = 0, n = n_sequences;
    while (n > 1) {
        const int step = (n + 31) / 32, i = first + lane_id() * step;
        const bool before = lane_id() * step < n && (int)(starts[i] / ROWS) + i <= slot;
        const int skipped = (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
        first += skipped;
        n = min(step, n - skipped);
    }
    place.sequence = first;
    place.start = starts[first];
    place.length = starts[first + 1] - starts[first];
    place.tile = slot - (place.start / ROWS + first);
    place.tiles = (place.length + ROWS - 1) / ROWS;
    return place.tile < place.tiles;
}

// ------------------------------------------------------------------------------------ delta

// delta = the sum of do * o over each head. Blocks: tokens * n_heads * DELTA_LANES / 128, rounded up.
constexpr int DELTA_LANES = D <= 16 ? 2 : D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;

extern "C" __global__ void __launch_bounds__(128)
    attention_delta(float* delta, const bf16* do_, const bf16* o, int n_tokens, int n_heads, int delta_stride,
                    int do_stride, int o_stride) {
    const i64 item = ((i64)blockIdx.x * 128 + threadIdx.x) / DELTA_LANES;
    const int chunk = threadIdx.x % DELTA_LANES, head = item % n_heads;
    const i64 token = item / n_heads;
    float sum = 0.0f;
    if (token < n_tokens && chunk < D / 8) {
        const bf16* x = do_ + token * do_stride + head * D + chunk * 8;
        const bf16* y = o + token * o_stride + head * D + chunk * 8;
        if (aligned16(x, 8) && aligned16(y, 8)) {
            const f32x8 a = load8(x), b = load8(y);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a.v[i] * b.v[i];
        } else {
            for (int i = 0; i < 8; i++) sum += to_f32(x[i]) * to_f32(y[i]);
        }
    }
#pragma unroll
    for (int lanes = DELTA_LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (token < n_tokens && chunk == 0) delta[(i64)head * delta_stride + token] = sum;
}
