struct Backward {
    bf16 *dq, *dk, *dv;
    const bf16 *do_, *q, *k, *v;
    const float *lse, *delta;
    const u32* starts;
    int n_sequences, n_heads, group;
    int dq_stride, dk_stride, dv_stride, do_stride, q_stride, k_stride, v_stride, lse_stride, delta_stride;
};

// s becomes p (times the derivative of the cap, if any), and `packed` the plain p. `lse2` gives the exponent of
// a score's query from (m, n, i).
template <int MT, int NT, typename Lse>
__device__ __forceinline__ void probabilities(u32 (&packed)[MT][NT][2], float (&s)[MT][NT][4], const Scoring& scoring,
                                              Lse lse2) {
    const bool capped = scoring.softcap > 0.0f;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float &x = s[m][n][2 * r], &y = s[m][n][2 * r + 1];
                const float p0 = exp2_fast(x * scoring.factor - lse2(m, n, 2 * r));
                const float p1 = exp2_fast(y * scoring.factor - lse2(m, n, 2 * r + 1));
                packed[m][n][r] = pack_bf16(p0, p1);
                x = capped ? scoring.capped(p0, x) : p0;
                y = capped ? scoring.capped(p1, y) : p1;
            }
}

// One tile of queries of a head: dq = scale sum_j ds_j k_j.
__device__ __forceinline__ void sum_dq(const Backward& b, const Scoring& scoring, int block) {
    constexpr int QUERIES = DQ_QUERIES, KEYS = DQ_KEYS, MT = QUERIES / 64, NT = KEYS / 8;
    const int head = block % b.n_heads, window = scoring.window;
    Place place;
    if (!find_place<QUERIES>(place, b.starts, b.n_sequences, block / b.n_heads)) return;
    const int query = (place.tiles - 1 - place.tile) * QUERIES, length = place.length;
    const int last = (min(length, query + QUERIES) - 1) / KEYS;
    const int first = window > 0 ? max(0, query - window + 1) / KEYS : 0;

    const i64 row = place.start + query;
    const bf16* q = b.q + row * b.q_stride + head * D + load_offset(b.q_stride);
    const bf16* do_ = b.do_ + row * b.do_stride + head * D + load_offset(b.do_stride);
    const int last_key = place.start + last * KEYS;
    const bf16* k = b.k + (i64)last_key * b.k_stride + head / b.group * D + load_offset(b.k_stride);
    const bf16* v = b.v + (i64)last_key * b.v_stride + head / b.group * D + load_offset(b.v_stride);
    const bool aligned = aligned16(k, b.k_stride) && aligned16(v, b.v_stride);
    const u32 q_tile = shared_address(tiles), do_tile = q_tile + QUERIES * PITCH, stages = do_tile + QUERIES * PITCH;
    const auto stage_of = [&](int left) { return stages + (left & 1) * 2 * KEYS * PITCH; };
    const auto load_keys = [&](u32 stage, int keys) {
        load_tile<KEYS>(stage, k, b.k_stride, keys, aligned);
        load_tile<KEYS>(stage + KEYS * PITCH, v, b.v_stride, keys, aligned);
        k -= (i64)KEYS * b.k_stride;
        v -= (i64)KEYS * b.v_stride;
    };
    load_tile<QUERIES>(q_tile, q, b.q_stride, length - query, aligned16(q, b.q_stride));
    load_tile<QUERIES>(do_tile, do_, b.do_stride, length - query, aligned16(do_, b.do_stride));
    load_keys(stage_of(last - first), length - last * KEYS);

    const int warp_row = warp_id() * 16 * MT, warp_first = query + warp_row;
    const u32 warp_tile = q_tile + warp_row * PITCH, q_lane = by_rows(warp_tile);
    float sum[MT][D / 8][4], lse2[MT][2], delta[MT][2], factor[MT][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = warp_first + m * 16 + r * 8 + lane_id() / 4;
            lse2[m][r] = i < length ? b.lse[(i64)head * b.lse_stride + place.start + i] * LOG2E : 0.0f;
            delta[m][r] = i < length ? b.delta[(i64)head * b.delta_stride + place.start + i] : 0.0f;
            factor[m][r] = scoring.scale;
        }

    // The last key, counted from the tile's first, that the warp's first query sees.
    int ahead = warp_first - last * KEYS;
    for (int left = last - first; left >= 0; left--, ahead += KEYS) {
        wait_for_copies();
        __syncthreads();
        // All tiles but the last are full.
        if (left > 0) load_keys(stage_of(left - 1), KEYS);
        if (ahead + 16 * MT <= 0 || (window > 0 && ahead - window >= KEYS - 1)) continue;

        const u32 stage = stage_of(left);
        float s[MT][NT][4], dp[MT][NT][4];
        u32 packed[MT][NT][2];
        // s = scale q . k, p = exp(s - lse)
        scores(s, q_lane, by_columns(stage));
        scoring.apply(s);
        if (ahead < KEYS - 1 || (window > 0 && ahead + 16 * MT > window)) hide_keys(s, ahead, window);
        probabilities(packed, s, scoring, [&](int m, int, int i) { return lse2[m][i / 2]; });
        // o = sum p v
        scores(dp, by_rows(do_tile + warp_row * PITCH), by_columns(stage + KEYS * PITCH));
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= dp[m][n][i] - delta[m][i / 2];
        pack(packed, s);
        mix(sum, packed, by_rows(stage));
    }
    store_rows(b.dq + (row + warp_row) * b.dq_stride + head * D, b.dq_stride, length - warp_first, warp_tile, sum,
               factor);
}

// One tile of keys of a key head: dk = scale sum_i ds_i q_i, dv = sum_i p_i do_i over all queries of the group.
template <bool DK, bool DV>
__device__ __forceinline__ void sum_dk_dv(const Backward& b, const Scoring& scoring, int block) {
    constexpr int KEYS = DKV_KEYS, QUERIES = DKV_QUERIES, MT = KEYS / 64;
    // Queries of one step: what the registers beside dk and dv hold.
    constexpr int STEP = MT == 2 ? 32 : QUERIES, NT = STEP / 8;
    const int n_kv_heads = b.n_heads / b.group, kv_head = block % n_kv_heads, window = scoring.window;
    Place place;
    if (!find_place<KEYS>(place, b.starts, b.n_sequences, block / n_kv_heads)) return;
    // The first keys are seen by the most queries: they start first.
    const int key = place.tile * KEYS, length = place.length;
    const int first = key / QUERIES;
    const int end = window > 0 ? (int)min((i64)length, (i64)key + KEYS - 1 + window) : length;
    const int n_tiles = (end - 1) / QUERIES - first + 1;

    const i64 row = place.start + key;
    const bf16* k = b.k + row * b.k_stride + kv_head * D + load_offset(b.k_stride);
    const bf16* v = b.v + row * b.v_stride + kv_head * D + load_offset(b.v_stride);
    const bf16* q = b.q + (i64)place.start * b.q_stride + kv_head * b.group * D + load_offset(b.q_stride);
    const bf16* do_ = b.do_ + (i64)place.start * b.do_stride + kv_head * b.group * D + load_offset(b.do_stride);
    const float* lse = b.lse + (i64)kv_head * b.group * b.lse_stride + place.start;
    const float* delta = b.delta + (i64)kv_head * b.group * b.delta_stride + place.start;
    const bool aligned = aligned16(q, b.q_stride) && aligned16(do_, b.do_stride);
    const u32 k_tile = shared_address(tiles), v_tile = k_tile + KEYS * PITCH, stages = v_tile + KEYS * PITCH;
    const u32 statistics = stages + 4 * QUERIES * PITCH;
    const auto load_queries = [&](int head, int tile, int parity) {
        const u32 stage = stages + parity * 2 * QUERIES * PITCH;
        const int query = (first + tile) * QUERIES, rows = length - query;
        load_tile<QUERIES>(stage, q + (i64)query * b.q_stride + head * D, b.q_stride, rows, aligned);
        load_tile<QUERIES>(stage + QUERIES * PITCH, do_ + (i64)query * b.do_stride + head * D, b.do_stride, rows,
                           aligned);
        if (threadIdx.x < 2 * QUERIES) {
            const int i = threadIdx.x % QUERIES;
            const float* x = (threadIdx.x < QUERIES ? lse + (i64)head * b.lse_stride
                                                    : delta + (i64)head * b.delta_stride) + query + i;
            copy4(statistics + (parity * 2 * QUERIES + threadIdx.x) * 4, x, i < rows ? 4 : 0);
        }
    };
    load_tile<KEYS>(k_tile, k, b.k_stride, length - key, aligned16(k, b.k_stride));
    if (DK) load_tile<KEYS>(v_tile, v, b.v_stride, length - key, aligned16(v, b.v_stride));
    load_queries(0, 0, 0);

    const int warp_row = warp_id() * 16 * MT, warp_first = key + warp_row, warp_last = warp_first + 16 * MT - 1;
    const u32 k_lane = by_rows(k_tile + warp_row * PITCH), v_lane = by_rows(v_tile + warp_row * PITCH);
    float dk[MT][D / 8][4], dv[MT][D / 8][4];
    if (DK) clear(dk);
    if (DV) clear(dv);

    for (int head = 0, tile = 0, parity = 0; head < b.group; parity ^= 1) {
        wait_for_copies();
        __syncthreads();
        const int next_head = tile + 1 < n_tiles ? head : head + 1, next_tile = tile + 1 < n_tiles ? tile + 1 : 0;
        if (next_head < b.group) load_queries(next_head, next_tile, parity ^ 1);
        const u32 q_stage = stages + parity * 2 * QUERIES * PITCH, do_stage = q_stage + QUERIES * PITCH;
#pragma unroll 1
        for (int step = 0; step < QUERIES; step += STEP) {
            const int query = (first + tile) * QUERIES + step;
            if (query + STEP - 1 < warp_first || (window > 0 && query - warp_last >= window)) continue;
            const u32 step_statistics = statistics + (parity * 2 * QUERIES + step + lane_id() % 4 * 2) * 4;

            float s[MT][NT][4];
            u32 p[MT][NT][2];
            // s = scale q . k, p = exp(s - lse)
            scores(s, k_lane, by_columns(q_stage + step * PITCH));
            scoring.apply(s);
            if (query < warp_last || (window > 0 && query + STEP - 1 - warp_first >= window))
                hide_queries(s, warp_first - query, window);
            float2 lse2[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) lse2[n] = load_shared_pair(step_statistics + n * 32);
            probabilities(p, s, scoring, [&](int, int n, int i) { return (i % 2 ? lse2[n].y : lse2[n].x) * LOG2E; });
            // o = sum p v
            if (DV) mix(dv, p, by_rows(do_stage + step * PITCH));
            if (DK) {
                float dp[MT][NT][4];
                scores(dp, v_lane, by_columns(do_stage + step * PITCH));
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const float2 d = load_shared_pair(step_statistics + QUERIES * 4 + n * 32);
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) s[m][n][i] *= dp[m][n][i] - (i % 2 ? d.y : d.x);
                }
                pack(p, s);
                mix(dk, p, by_rows(q_stage + step * PITCH));
            }
        }
        head = next_head;
        tile = next_tile;
    }

    float scale[MT][2], one[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            scale[m][r] = scoring.scale;
            one[m][r] = 1.0f;
        }
    const int rows = length - warp_first;
    if (DK)
        store_rows(b.dk + (row + warp_row) * b.dk_stride + kv_head * D, b.dk_stride, rows, k_tile + warp_row * PITCH,
                   dk, scale);
    if (DV)
        store_rows(b.dv + (row + warp_row) * b.dv_stride + kv_head * D, b.dv_stride, rows, v_tile + warp_row * PITCH,
                   dv, one);
}

// The registers hold dk and dv of 16 keys up to 128 elements a head; above, each has its own blocks.
constexpr bool DK_WITH_DV = D <= 128;

// Blocks: key_blocks = (tokens / DKV_KEYS + n_sequences) * n_kv_heads, twice without DK_WITH_DV, then
// (tokens / DQ_QUERIES + n_sequences) * n_heads.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_backward(bf16* dq, bf16* dk, bf16* dv, const float* delta, const bf16* do_, const float* lse,
                       const bf16* q, const bf16* k, const bf16* v, const u32* starts, int n_sequences,
                       int key_blocks, int n_heads, int group, int dq_stride, int dk_stride, int dv_stride,
                       int delta_stride, int do_stride, int lse_stride, int q_stride, int k_stride, int v_stride,
                       float scale, float softcap, int window) {
    const Backward b = {dq,        dk,        dv,        do_,       q,        k,        v,
                        lse,       delta,     starts,    n_sequences, n_heads, group,   dq_stride,
                        dk_stride, dv_stride, do_stride, q_stride,  k_stride, v_stride, lse_stride,
                        delta_stride};
    const Scoring scoring(scale, softcap, window);
    const int block = blockIdx.x;
    if (DK_WITH_DV) {
        if (block < key_blocks)
            sum_dk_dv<true, true>(b, scoring, block);
        else
            sum_dq(b, scoring, block - key_blocks);
    } else if (block < key_blocks) {
        sum_dk_dv<true, false>(b, scoring, block);
    } else if (block < 2 * key_blocks) {
        sum_dk_dv<false, true>(b, scoring, block - key_blocks);
    } else {
        sum_dq(b, scoring, block - 2 * key_blocks);
    }
}
