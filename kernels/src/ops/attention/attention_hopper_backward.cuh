// As in the portable kernels some blocks walk over queries and sum dK and dV (of all query heads of the group), the
// others walk over keys and sum dQ; both recompute the probabilities from lse.
//
// Shared memory: two tiles of 128 rows that stay (K and V, or Q and dO), stages of two tiles of 64 rows (Q and dO, or K
// and V), for each stage 64 x (lse, delta), barriers.
constexpr int BACKWARD_STAGES = 4;
constexpr u32 FIXED_BYTES = tile_bytes(128), MOVING_BYTES = tile_bytes(64);

struct Backward {
    const TensorMap *q_map, *k_map, *v_map, *do_map;
    bf16 *dq, *dk, *dv;
    const float *lse, *delta;
    const u32* starts;
    int n_sequences, n_heads, group;
    int dq_stride, dk_stride, dv_stride, lse_stride, delta_stride;
    float scale;
};

// Where things lie in shared memory.
struct Layout {
    u32 fixed, stages, statistics, barriers;
    __device__ __forceinline__ Layout() {
        fixed = shared_address(tiles);
        stages = fixed + 2 * FIXED_BYTES;
        statistics = stages + BACKWARD_STAGES * 2 * MOVING_BYTES;
        barriers = statistics + BACKWARD_STAGES * 512;
    }
    __device__ __forceinline__ u32 other_fixed() const { return fixed + FIXED_BYTES; }
    __device__ __forceinline__ u32 stage(int i) const { return stages + i * 2 * MOVING_BYTES; }
    __device__ __forceinline__ u32 statistics_of(int i) const { return statistics + i * 512; }
    __device__ __forceinline__ u32 fixed_full() const { return barriers; }
    __device__ __forceinline__ u32 full(int i) const { return barriers + 8 + i * 16; }
    __device__ __forceinline__ u32 empty(int i) const { return barriers + 16 + i * 16; }
};

__device__ __forceinline__ void store_shared(u32 address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

template <int N> __device__ __forceinline__ void clear(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = 0.0f;
}

// ------------------------------------------------------------------------------------ dq

struct Queries {
    int head, row, rows, first, last, keys_row;
};

__device__ __forceinline__ bool find_queries(Queries& item, const Backward& b, int block) {
    Place place;
    if (!find_place<128>(place, b.starts, b.n_sequences, block / b.n_heads)) return false;
    item.head = block % b.n_heads;
    // The last queries see the most keys: they start first.
    item.first = (place.tiles - 1 - place.tile) * 128;
    item.row = place.start + item.first;
    item.rows = place.length - item.first;
    item.last = (min(place.length, item.first + 128) - 1) / 64;
    item.keys_row = place.start;
    return true;
}

__device__ __forceinline__ void copy_for_dq(const Backward& b, const Layout& at, int block) {
    Queries item;
    if (!find_queries(item, b, block)) return;
    const int kv_head = item.head / b.group;
    const bool copies = lane_id() == 0;
    if (copies) {
        arrive_expecting(at.fixed_full(), 2 * FIXED_BYTES);
        copy_tile<128>(at.fixed, b.q_map, item.head, item.row, at.fixed_full());
        copy_tile<128>(at.other_fixed(), b.do_map, item.head, item.row, at.fixed_full());
    }
    Ring<BACKWARD_STAGES> ring;
    for (int tile = item.last; tile >= 0; tile--, ring.next()) {
        const u32 full = at.full(ring.stage), stage = at.stage(ring.stage);
        const int row = item.keys_row + tile * 64;
        wait_for(at.empty(ring.stage), ring.parity ^ 1);
        if (copies) {
            arrive_expecting(full, 2 * MOVING_BYTES);
            copy_tile<64>(stage, b.k_map, kv_head, row, full);
            copy_tile<64>(stage + MOVING_BYTES, b.v_map, kv_head, row, full);
        } else {
            arrive(full);
        }
    }
}

// One tile of queries of a head: dq = scale sum_j ds_j k_j.
__device__ __forceinline__ void sum_dq(const Backward& b, const Layout& at, int block) {
    Queries item;
    if (!find_queries(item, b, block)) return;
    const int side = threadIdx.x / 128 - 1, warp_row = warp_id() * 16 - 64;
    const float factor = b.scale * LOG2E;
    float sum[D / 2], lse2[2], delta[2];
    clear(sum);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = warp_row + r * 8 + lane_id() / 4;
        const bool present = i < item.rows;
        lse2[r] = present ? b.lse[(i64)item.head * b.lse_stride + item.row + i] * LOG2E : -HIDDEN;
        delta[r] = present ? b.delta[(i64)item.head * b.delta_stride + item.row + i] : 0.0f;
    }
    const u32 q_rows = at.fixed + side * 64 * 128, do_rows = at.other_fixed() + side * 64 * 128;
    // The last key, counted from the tile's first, that the warp's first query sees.
    int tile = item.last, ahead = item.first + warp_row - tile * 64, used = -1;
    Ring<BACKWARD_STAGES> ring;
    wait_for(at.fixed_full(), 0);
    u32 p[16];
    if (tile * 64 > item.first + side * 64 + 63) {
        // None of its queries sees the last tile.
        wait_for(at.full(0), 0);
        if (lane_id() == 0) arrive(at.empty(0));
        ring.next();
        tile--;
        ahead += 64;
    }
    pin(sum);
#pragma unroll 1
    for (; tile >= 0; tile--, ahead += 64, ring.next()) {
        const u32 stage = at.stage(ring.stage);
        wait_for(at.full(ring.stage), ring.parity);
        float s[32], dp[32];
        pin(s);
        pin(dp);
        products_begin();
        scores<128>(s, q_rows, stage);
        products_commit();
        scores<128>(dp, do_rows, stage + MOVING_BYTES);
        products_commit();
        products_wait<2>();
        if (used >= 0 && lane_id() == 0) arrive(at.empty(used));
        used = ring.stage;
        products_wait<1>();
        pin(s);
        if (ahead < 63) {
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (column_of(i) > ahead + row_of(i)) s[i] = HIDDEN;
        }
#pragma unroll
        for (int i = 0; i < 32; i++) s[i] = exp2_fast(fmaf(s[i], factor, -lse2[i / 2 % 2]));
        products_wait<0>();
        pin(dp);
#pragma unroll
        for (int i = 0; i < 16; i++)
            p[i] = pack_bf16(s[2 * i] * (dp[2 * i] - delta[i % 2]), s[2 * i + 1] * (dp[2 * i + 1] - delta[i % 2]));
        products_begin();
        mix(sum, p, stage, true);
        products_commit();
    }
    products_wait<0>();
    pin(sum);
    const float scales[2] = {b.scale, b.scale};
    store_rows(b.dq + (i64)(item.row + warp_row) * b.dq_stride + item.head * D, b.dq_stride, item.rows - warp_row, sum,
               scales);
}

// ------------------------------------------------------------------------------------ dk and dv

struct Keys {
    int kv_head, row, rows, first, start, length, tile, tiles;
};

__device__ __forceinline__ bool find_keys(Keys& item, const Backward& b, int block) {
    const int n_kv_heads = b.n_heads / b.group;
    Place place;
    if (!find_place<128>(place, b.starts, b.n_sequences, block / n_kv_heads)) return false;
    item.kv_head = block % n_kv_heads;
    // The first keys are seen by the most queries: they start first.
    item.first = place.tile * 128;
    item.row = place.start + item.first;
    item.rows = place.length - item.first;
    item.start = place.start;
    item.length = place.length;
    item.tile = item.first / 64;
    item.tiles = (place.length + 63) / 64;
    return true;
}

__device__ __forceinline__ void copy_for_dk_dv(const Backward& b, const Layout& at, int block) {
    Keys item;
    if (!find_keys(item, b, block)) return;
    const bool copies = lane_id() == 0;
    if (copies) {
        arrive_expecting(at.fixed_full(), 2 * FIXED_BYTES);
        copy_tile<128>(at.fixed, b.k_map, item.kv_head, item.row, at.fixed_full());
        copy_tile<128>(at.other_fixed(), b.v_map, item.kv_head, item.row, at.fixed_full());
    }
    Ring<BACKWARD_STAGES> ring;
    for (int i = 0; i < b.group; i++) {
        const int head = item.kv_head * b.group + i;
        const float* lse = b.lse + (i64)head * b.lse_stride + item.start;
        const float* delta = b.delta + (i64)head * b.delta_stride + item.start;
        for (int tile = item.tile; tile < item.tiles; tile++, ring.next()) {
            const u32 full = at.full(ring.stage), stage = at.stage(ring.stage);
            wait_for(at.empty(ring.stage), ring.parity ^ 1);
            if (copies) {
                arrive_expecting(full, 2 * MOVING_BYTES);
                copy_tile<64>(stage, b.q_map, head, item.start + tile * 64, full);
                copy_tile<64>(stage + MOVING_BYTES, b.do_map, head, item.start + tile * 64, full);
            }
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const int row = lane_id() + part * 32, query = tile * 64 + row;
                const bool present = query < item.length;
                const u32 to = at.statistics_of(ring.stage) + row * 4;
                store_shared(to, present ? lse[query] * LOG2E : -HIDDEN);
                store_shared(to + 256, present ? delta[query] : 0.0f);
            }
            arrive(full);
        }
    }
}

// One tile of keys of a key head: dk = scale sum_i ds_i q_i, dv = sum_i p_i do_i over all queries of the group.
__device__ __forceinline__ void sum_dk_dv(const Backward& b, const Layout& at, int block) {
    Keys item;
    if (!find_keys(item, b, block)) return;
    const int side = threadIdx.x / 128 - 1, warp_row = warp_id() * 16 - 64;
    const float factor = b.scale * LOG2E;
    float dk[D / 2], dv[D / 2];
    clear(dk);
    clear(dv);
    const u32 k_rows = at.fixed + side * 64 * 128, v_rows = at.other_fixed() + side * 64 * 128;
    const int steps = b.group * (item.tiles - item.tile);
    Ring<BACKWARD_STAGES> ring;
    wait_for(at.fixed_full(), 0);
    int tile = item.tile;
#pragma unroll 1
    for (int step = 0; step < steps; step++, ring.next()) {
        const u32 stage = at.stage(ring.stage);
        // The first query, counted from the tile's first, that sees the warp's first key.
        const int ahead = item.first + warp_row - tile * 64;
        const bool hidden = tile * 64 + 63 < item.first + side * 64;
        if (++tile == item.tiles) tile = item.tile;
        wait_for(at.full(ring.stage), ring.parity);
        if (!hidden) {
            const u32 statistics = at.statistics_of(ring.stage) + lane_id() % 4 * 8;
            float s[32], dp[32];
            u32 p[16], ds[16];
            pin(s);
            pin(dp);
            pin(dk);
            pin(dv);
            products_begin();
            scores<128>(s, k_rows, stage);
            products_commit();
            scores<128>(dp, v_rows, stage + MOVING_BYTES);
            products_commit();
            products_wait<1>();
            pin(s);
            if (ahead + 15 > 0) {
#pragma unroll
                for (int i = 0; i < 32; i++)
                    if (column_of(i) < ahead + row_of(i)) s[i] = HIDDEN;
            }
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 lse2 = load_shared_pair(statistics + n * 32);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float &x = s[4 * n + 2 * r], &y = s[4 * n + 2 * r + 1];
                    x = exp2_fast(fmaf(x, factor, -lse2.x));
                    y = exp2_fast(fmaf(y, factor, -lse2.y));
                    p[2 * n + r] = pack_bf16(x, y);
                }
            }
            products_begin();
            mix(dv, p, stage + MOVING_BYTES, true);
            products_commit();
            products_wait<1>();
            pin(dp);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 delta = load_shared_pair(statistics + 256 + n * 32);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    ds[2 * n + r] = pack_bf16(s[4 * n + 2 * r] * (dp[4 * n + 2 * r] - delta.x),
                                              s[4 * n + 2 * r + 1] * (dp[4 * n + 2 * r + 1] - delta.y));
            }
            products_begin();
            mix(dk, ds, stage, true);
            products_commit();
            products_wait<0>();
            pin(dk);
            pin(dv);
        }
        if (lane_id() == 0) arrive(at.empty(ring.stage));
    }
    const float scales[2] = {b.scale, b.scale}, ones[2] = {1.0f, 1.0f};
    const i64 row = item.row + warp_row;
    store_rows(b.dk + row * b.dk_stride + item.kv_head * D, b.dk_stride, item.rows - warp_row, dk, scales);
    store_rows(b.dv + row * b.dv_stride + item.kv_head * D, b.dv_stride, item.rows - warp_row, dv, ones);
}

// Blocks: key_blocks = (tokens / 128 + n_sequences) * n_kv_heads, then (tokens / 128 + n_sequences) * n_heads.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                              const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap do_map,
                              bf16* dq, bf16* dk, bf16* dv, const float* delta, const float* lse, const u32* starts,
                              int n_sequences, int key_blocks, int n_heads, int group, int dq_stride, int dk_stride,
                              int dv_stride, int delta_stride, int lse_stride, float scale) {
    const Backward b = {&q_map, &k_map, &v_map,      &do_map, dq,    dk,        dv,        lse,       delta,
                        starts, n_sequences, n_heads, group,  dq_stride, dk_stride, dv_stride, lse_stride, delta_stride,
                        scale};
    const Layout at;
    const int block = blockIdx.x;
    if (threadIdx.x == 0) {
        barrier_init(at.fixed_full(), 1);
        for (int i = 0; i < BACKWARD_STAGES; i++) {
            barrier_init(at.full(i), block < key_blocks ? 33 : 32);
            barrier_init(at.empty(i), 8);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (warp_id() == 0) {
            if (block < key_blocks) copy_for_dk_dv(b, at, block);
            else copy_for_dq(b, at, block - key_blocks);
        }
    } else {
        take_registers<240>();
        if (block < key_blocks) sum_dk_dv(b, at, block);
        else sum_dq(b, at, block - key_blocks);
    }
}
