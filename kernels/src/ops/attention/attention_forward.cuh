// Blocks: (queries / FORWARD_QUERIES + n_sequences) * n_heads.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_forward(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const u32* q_starts,
                      const u32* k_starts, int n_sequences, int n_heads, int group, int o_stride, int lse_stride,
                      int q_stride, int k_stride, int v_stride, float scale, float softcap, int window) {
    constexpr int QUERIES = FORWARD_QUERIES, KEYS = FORWARD_KEYS, MT = QUERIES / 64, NT = KEYS / 8;
    const int head = blockIdx.x % n_heads;
    Place place;
    if (!find_place<QUERIES>(place, q_starts, n_sequences, blockIdx.x / n_heads)) return;
    // The last queries see the most keys: they start first.
    const int query = (place.tiles - 1 - place.tile) * QUERIES;
    const int k_start = k_starts[place.sequence], n_keys = k_starts[place.sequence + 1] - k_start;
    const int offset = n_keys - place.length;
    const int last = (min(n_keys, query + QUERIES + offset) - 1) / KEYS;
    const int first = window > 0 ? max(0, query + offset - window + 1) / KEYS : 0;
    const Scoring scoring(scale, softcap, window);
    const int warp_row = warp_id() * 16 * MT;
    const int row = place.start + query + warp_row;
    const int rows = place.length - query - warp_row;

    const u32 q_tile = shared_address(tiles), stages = q_tile + QUERIES * PITCH;
    const u32 warp_tile = q_tile + warp_row * PITCH, q_lane = by_rows(warp_tile);
    q += (i64)(row - warp_row) * q_stride + head * D + load_offset(q_stride);
    load_tile<QUERIES>(q_tile, q, q_stride, place.length - query, aligned16(q, q_stride));
    k += (i64)(k_start + last * KEYS) * k_stride + head / group * D + load_offset(k_stride);
    v += (i64)(k_start + last * KEYS) * v_stride + head / group * D + load_offset(v_stride);
    const bool aligned = aligned16(k, k_stride) && aligned16(v, v_stride);
    const auto load_keys = [&](u32 stage, int keys) {
        load_tile<KEYS>(stage, k, k_stride, keys, aligned);
        load_tile<KEYS>(stage + KEYS * PITCH, v, v_stride, keys, aligned);
        k -= (i64)KEYS * k_stride;
        v -= (i64)KEYS * v_stride;
    };
    const auto stage_of = [&](int left) { return stages + (left & 1) * 2 * KEYS * PITCH; };
    load_keys(stage_of(last - first), n_keys - last * KEYS);

    float sum[MT][D / 8][4], largest[MT][2], weight[MT][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            largest[m][r] = HIDDEN;
            weight[m][r] = 0.0f;
        }

    // The last key, counted from the tile's first, that the warp's first query sees.
    int ahead = query + warp_row + offset - last * KEYS;
    for (int left = last - first; left >= 0; left--, ahead += KEYS) {
        wait_for_copies();
        __syncthreads();
        // All tiles but the last are full.
        if (left > 0) load_keys(stage_of(left - 1), KEYS);
        if (ahead + 16 * MT <= 0 || (window > 0 && ahead - window >= KEYS - 1)) continue;

        const u32 stage = stage_of(left);
        float s[MT][NT][4];
        scores(s, q_lane, by_columns(stage));
        scoring.apply(s);
        if (ahead < KEYS - 1 || (window > 0 && ahead + 16 * MT > window)) hide_keys(s, ahead, window);

        // Sums shrink to a new maximum only once it has grown by 2^8: f32 has room, and most tiles need no shrinking.
        float tile_largest[MT][2];
        bool grown = false;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = HIDDEN;
#pragma unroll
                for (int n = 0; n < NT; n++) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                tile_largest[m][r] = x;
                grown |= (x - largest[m][r]) * scoring.factor > 8.0f;
            }
        if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    // Row by row, so that no row's bits depend on its neighbours.
                    const float rise = (tile_largest[m][r] - largest[m][r]) * scoring.factor;
                    if (rise > 8.0f) {
                        const float shrink = exp2_fast(-rise);
                        largest[m][r] = tile_largest[m][r];
                        weight[m][r] *= shrink;
#pragma unroll
                        for (int n = 0; n < D / 8; n++) {
                            sum[m][n][2 * r] *= shrink;
                            sum[m][n][2 * r + 1] *= shrink;
                        }
                    }
                }
        }
        u32 p[MT][NT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float shift = largest[m][r] == HIDDEN ? 0.0f : largest[m][r] * scoring.factor;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const float p0 = exp2_fast(s[m][n][2 * r] * scoring.factor - shift);
                    const float p1 = exp2_fast(s[m][n][2 * r + 1] * scoring.factor - shift);
                    weight[m][r] += p0 + p1;
                    p[m][n][r] = pack_bf16(p0, p1);
                }
            }
        mix(sum, p, by_rows(stage + KEYS * PITCH));
    }

    lse += (i64)head * lse_stride + row;
    float factor[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x = weight[m][r];
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
            factor[m][r] = 1.0f / x;
            const int row = m * 16 + r * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0 && row < rows) lse[row] = LN2 * (largest[m][r] * scoring.factor) + logf(x);
        }
    store_rows(o + (i64)row * o_stride + head * D, o_stride, rows, warp_tile, sum, factor);
}
