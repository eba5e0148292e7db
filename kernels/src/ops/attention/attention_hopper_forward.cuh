// Warpgroups that multiply. With 64 elements a head the softmax takes longer than the products, and the sums leave
// registers for a third.
constexpr int SIDES = D == 64 ? 3 : 2;
constexpr int FORWARD_THREADS = 128 * (SIDES + 1);

// Shared memory: queries, stages of keys, stages of values, barriers.
constexpr int QUERIES = 64 * SIDES, KEYS = 128, FORWARD_STAGES = 2;
constexpr u32 KEYS_BYTES = tile_bytes(KEYS), QUERIES_BYTES = tile_bytes(QUERIES);

// The softmax of one tile of scores: s becomes p; returns whether the sums must shrink, by `shrink`.
template <int N>
__device__ __forceinline__ bool softmax(float (&s)[N], float (&largest)[2], float (&weight)[2], float (&shrink)[2],
                                        float factor) {
    // Sums shrink to a new maximum only once it has grown by 2^8: f32 has room, and most tiles need no shrinking.
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < N; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
        grown = grown || (top[r] - largest[r]) * factor > 8.0f;
    }
    grown = __any_sync(0xffffffffu, grown);
    if (grown) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float next = fmaxf(largest[r], top[r]);
            shrink[r] = next == HIDDEN ? 1.0f : exp2_fast((largest[r] - next) * factor);
            largest[r] = next;
            weight[r] *= shrink[r];
        }
    }
    float minus[2];
#pragma unroll
    for (int r = 0; r < 2; r++) minus[r] = largest[r] == HIDDEN ? 0.0f : -largest[r] * factor;
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = exp2_fast(fmaf(s[i], factor, minus[i / 2 % 2]));
    float sum[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < N; i++) sum[i % 4] += s[i];
    weight[0] += sum[0] + sum[1];
    weight[1] += sum[2] + sum[3];
    return grown;
}

template <int N> __device__ __forceinline__ void pack(u32 (&p)[N], const float (&s)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// Hides the keys behind `last` of the warp's first row, counted from the tile's first key.
template <int N> __device__ __forceinline__ void hide_keys(float (&s)[N], int last) {
#pragma unroll
    for (int i = 0; i < N; i++)
        if (column_of(i) > last + row_of(i)) s[i] = HIDDEN;
}

// Blocks: (tokens / QUERIES + n_sequences) * n_heads.
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, 1)
    attention_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                      const __grid_constant__ TensorMap v_map, bf16* o, float* lse, const u32* starts,
                      int n_sequences, int n_heads, int group, int o_stride, int lse_stride, float scale) {
    Place place;
    if (!find_place<QUERIES>(place, starts, n_sequences, blockIdx.x / n_heads)) return;
    const int head = blockIdx.x % n_heads;
    // The last queries see the most keys: they start first.
    const int query = (place.tiles - 1 - place.tile) * QUERIES;
    const int last = (min(place.length, query + QUERIES) - 1) / KEYS;

    const u32 q_tile = shared_address(tiles), k_stages = q_tile + QUERIES_BYTES;
    const u32 v_stages = k_stages + FORWARD_STAGES * KEYS_BYTES, barriers = v_stages + FORWARD_STAGES * KEYS_BYTES;
    const u32 q_full = barriers;
    const auto k_full = [&](int stage) { return barriers + 8 + stage * 32; };
    const auto k_empty = [&](int stage) { return barriers + 16 + stage * 32; };
    const auto v_full = [&](int stage) { return barriers + 24 + stage * 32; };
    const auto v_empty = [&](int stage) { return barriers + 32 + stage * 32; };
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < FORWARD_STAGES; i++) {
            barrier_init(k_full(i), 1);
            barrier_init(k_empty(i), 4 * SIDES);
            barrier_init(v_full(i), 1);
            barrier_init(v_empty(i), 4 * SIDES);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        give_registers<SIDES == 2 ? 24 : 32>();
        if (threadIdx.x == 0) {
            arrive_expecting(q_full, QUERIES_BYTES);
            copy_tile<QUERIES>(q_tile, &q_map, head, place.start + query, q_full);
            Ring<FORWARD_STAGES> ring;
            for (int tile = last; tile >= 0; tile--, ring.next()) {
                const int row = place.start + tile * KEYS;
                const u32 k = k_full(ring.stage), v = v_full(ring.stage);
                wait_for(k_empty(ring.stage), ring.parity ^ 1);
                arrive_expecting(k, KEYS_BYTES);
                copy_tile<KEYS>(k_stages + ring.stage * KEYS_BYTES, &k_map, head / group, row, k);
                wait_for(v_empty(ring.stage), ring.parity ^ 1);
                arrive_expecting(v, KEYS_BYTES);
                copy_tile<KEYS>(v_stages + ring.stage * KEYS_BYTES, &v_map, head / group, row, v);
            }
        }
    } else {
        take_registers<SIDES == 2 ? 240 : 160>();
        const int side = threadIdx.x / 128 - 1, warp_row = warp_id() * 16 - 64;
        const u32 q_rows = q_tile + side * 64 * 128;
        const float factor = scale * LOG2E;
        const auto release = [&](u32 barrier) {
            if (lane_id() == 0) arrive(barrier);
        };
        float s[KEYS / 2], sum[D / 2], largest[2] = {HIDDEN, HIDDEN}, weight[2] = {0.0f, 0.0f}, shrink[2];
        u32 p[KEYS / 4];
        Ring<FORWARD_STAGES> k_ring, v_ring;
        // One warpgroup's softmax runs beside the others' products.
        if (side == SIDES - 1) turn_pass(1);
        // The last key, counted from the tile's first, that the warp's first query sees.
        int ahead = query + warp_row - last * KEYS;

        wait_for(q_full, 0);
        wait_for(k_full(0), 0);
        pin(s);
        products_begin();
        scores<QUERIES>(s, q_rows, k_stages);
        products_commit();
        products_wait<0>();
        pin(s);
        release(k_empty(0));
        k_ring.next();
        hide_keys(s, ahead);
        softmax(s, largest, weight, shrink, factor);
        pack(p, s);
        bool add = false;
#pragma unroll 1
        for (int tile = last - 1; tile >= 0; tile--) {
            ahead += KEYS;
            wait_for(k_full(k_ring.stage), k_ring.parity);
            turn_wait(1 + side);
            pin(s);
            pin(sum);
            products_begin();
            scores<QUERIES>(s, q_rows, k_stages + k_ring.stage * KEYS_BYTES);
            products_commit();
            wait_for(v_full(v_ring.stage), v_ring.parity);
            products_begin();
            mix(sum, p, v_stages + v_ring.stage * KEYS_BYTES, add);
            products_commit();
            add = true;
            turn_pass(1 + (side + 1) % SIDES);
            products_wait<1>();
            pin(s);
            release(k_empty(k_ring.stage));
            k_ring.next();
            if (QUERIES > KEYS && ahead < KEYS - 1) hide_keys(s, ahead);
            const bool grown = softmax(s, largest, weight, shrink, factor);
            products_wait<0>();
            pin(sum);
            release(v_empty(v_ring.stage));
            v_ring.next();
            if (grown) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) sum[i] *= shrink[i / 2 % 2];
            }
            pack(p, s);
        }
        wait_for(v_full(v_ring.stage), v_ring.parity);
        pin(sum);
        products_begin();
        mix(sum, p, v_stages + v_ring.stage * KEYS_BYTES, add);
        products_commit();
        products_wait<0>();
        pin(sum);

        const int row = place.start + query + warp_row, rows = place.length - query - warp_row;
        float over[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x = weight[r];
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
            over[r] = 1.0f / x;
            const int i = r * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && i < rows)
                lse[(i64)head * lse_stride + row + i] = LN2 * (largest[r] * factor) + logf(x);
        }
        store_rows(o + (i64)row * o_stride + head * D, o_stride, rows, sum, over);
    }
}
