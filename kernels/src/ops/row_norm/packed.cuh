// Norms of rows as they are packed, for ranks 1 to 16 and a multiple of 32 columns.
//
// W . (B A) = sum_r b_r (W A^T)_r and |B A|^2 = b (A A^T) b^T, so that a block needs W A^T of its rows and A A^T. Its warps
// take pieces of the columns in turn, and their products are added in the end, warp by warp. A warp decodes 16 rows of
// a piece into a tile of its own in shared memory, as neighbouring lanes read them, and takes operands of products from
// there: all rows of the block, so that a piece of A is read once. W is the right operand (of 8 rows), whose registers
// are those of a load of 16 bytes, since columns may be summed in any order.

// Rows of a tile, columns of a piece, and columns that a warp reads of 8 rows at a time.
constexpr u32 TILE_ROWS = 16, PIECE = 128, LOAD = 32;
constexpr u32 CHUNKS = PIECE / 8, TILE = TILE_ROWS * CHUNKS;

// Products of 16 ranks and 8 rows: two for each tile of a block of at most two, and two of A A^T.
constexpr u32 OF_W = 4, PRODUCTS = OF_W + 2;

// Tiles of the warps, each TILE times 16 bytes; at the end their products.
extern __shared__ __align__(128) unsigned char shared[];

// Where chunk `chunk` (8 columns) of a row lies in a tile. Rows that four lanes each read at once lie in other banks.
__device__ __forceinline__ u32 place_of_chunk(u32 row, u32 chunk) { return row * CHUNKS + (chunk ^ row % 2 * 4); }

// Where element (r, row) of products lies when every lane has stored what it has of each.
__device__ __forceinline__ u32 place(u32 r, u32 row) {
    const u32 lane = r % 8 * 4 + row % 8 / 2;
    return (row / 8 * 32 + lane) * 4 + r / 8 * 2 + row % 2;
}

// |W + s B A|^2 of a row, from the row itself, by a warp. Rarely run: a little code matters more than a little time.
template <class D>
__device__ __forceinline__ double measure(const Factors& ba, const Packed& p, const Scaling& scaling, const u32* table,
                                          u32 row) {
    double square = 0.0;
#pragma unroll 1
    for (u32 k = threadIdx.x % 32; k < p.cols; k += 32) {
        const u32 group = k / 8;
        const f32x8 values = value(load<D>(p, scaling, row, group), table, p, scaling, row, group, true);
        float w = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 8; j++) w = j == k % 8 ? values.v[j] : w;
        const double sum = to_f32(to_bf16(w)) + ba.product(row, k);
        square += sum * sum;
    }
    return sum_over(square, 32);
}

// Blocks of 8 or 16 warps, for `tiles` (1 or 2) tiles of rows.
template <class D>
__device__ __forceinline__ void row_norm(const Results& out, const Factors& ba, const Packed& p, float factor, u32 rows,
                                         u32 tiles) {
    // Rounds of two rows that make a tile, and those that a lane has under way.
    constexpr u32 ROUNDS = TILE_ROWS / 2, UNDER_WAY = 4;
    __shared__ u32 table[D::TABLE > 0 ? D::TABLE : 1];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const u32 g = lane / 4, t = lane % 4, top = blockIdx.x * TILE_ROWS * tiles;
    const Scaling scaling = {factor, nullptr};
    const bool finished = is_finished<D>(p, scaling, true);
    uint4* tile = reinterpret_cast<uint4*>(shared) + warp * TILE;

    // Row of a round of a tile, and its group; a row past the last is a copy of the last, and what is behind the last
    // group one of that.
    const auto row_of = [&](u32 i, u32 round) { return min(top + i * TILE_ROWS + round * 2 + lane / 16, rows - 1); };
    const auto group_of = [&](u32 col) { return min(col / 8 + lane % 16, p.groups - 1); };
    Loaded<D> loaded[UNDER_WAY];
    const auto load_rounds = [&](u32 col, u32 i, u32 first) {
#pragma unroll
        for (u32 n = 0; n < UNDER_WAY; n++) loaded[n] = load<D>(p, scaling, row_of(i, first + n), group_of(col));
    };

    u32 col = warp * PIECE;
    load_rounds(col, 0, 0);
    if (D::TABLE > 0) fill<D>(table, p);
    float products[PRODUCTS][4] = {};
#pragma unroll 1
    for (; col < p.cols; col += warps * PIECE) {
        uint4 a[PIECE / LOAD][2];
#pragma unroll
        for (u32 k = 0; k < PIECE / LOAD; k++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 r = min(g + 8 * i, ba.rank - 1), at = min(col + k * LOAD, p.cols - LOAD) + t * 8;
                a[k][i] = load_shared_by_all(ba.a + (u64)r * ba.a_stride + at);
            }
        // The loops over tiles and halves of them stay loops: unrolled, they are slow to compile and no faster.
#pragma unroll 1
        for (u32 i = 0; i < tiles; i++) {
#pragma unroll 1
            for (u32 first = 0; first < ROUNDS; first += UNDER_WAY) {
#pragma unroll
                for (u32 n = 0; n < UNDER_WAY; n += 2) {
                    // Two at a time, so that one is decoded while the other waits for its table.
                    f32x8 x[2];
#pragma unroll
                    for (u32 m = 0; m < 2; m++)
                        x[m] = D::decode(loaded[n + m].raw, table, p, row_of(i, first + n + m), group_of(col));
                    if (!finished) {
#pragma unroll
                        for (u32 m = 0; m < 2; m++) finish<D>(x[m], 1.0f, p, scaling, true);
                    }
#pragma unroll
                    for (u32 m = 0; m < 2; m++)
                        tile[place_of_chunk((first + n + m) * 2 + lane / 16, lane % 16)] =
                            make_uint4(pack_bf16(x[m].v[0], x[m].v[1]), pack_bf16(x[m].v[2], x[m].v[3]),
                                       pack_bf16(x[m].v[4], x[m].v[5]), pack_bf16(x[m].v[6], x[m].v[7]));
                }
                // What comes next is under way while products are made.
                const bool inside = first + UNDER_WAY < ROUNDS, last = i + 1 == tiles;
                const u32 next = inside || !last ? col : col + warps * PIECE;
                if (next < p.cols) load_rounds(next, inside ? i : last ? 0 : i + 1, inside ? first + UNDER_WAY : 0);
            }
            __syncwarp();
#pragma unroll
            for (u32 k = 0; k < PIECE / LOAD; k++) {
                if (col + k * LOAD >= p.cols) break;
                const uint4 early = make_uint4(a[k][0].x, a[k][1].x, a[k][0].y, a[k][1].y);
                const uint4 late = make_uint4(a[k][0].z, a[k][1].z, a[k][0].w, a[k][1].w);
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    const uint4 w = tile[place_of_chunk(j * 8 + g, k * 4 + t)];
                    mma(products[j], early, w.x, w.y);
                    mma(products[j], late, w.z, w.w);
                }
                // A A^T once for all tiles.
                if (i > 0) continue;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    mma(products[OF_W + j], early, a[k][j].x, a[k][j].y);
                    mma(products[OF_W + j], late, a[k][j].z, a[k][j].w);
                }
            }
            // The products of the next tile come to the front.
            if (tiles == 2) {
#pragma unroll
                for (u32 j = 0; j < 2; j++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        const float other = products[2 + j][c];
                        products[2 + j][c] = products[j][c];
                        products[j][c] = other;
                    }
            }
            __syncwarp();
        }
    }

    // Half a warp shares a row now; 16 warps have no row for their second pass.
    const u32 part = lane % 16, row_of_pass = threadIdx.x / 16, rows_of_pass = warps * 2;
    Row of_pass[2];
    float own_b[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        of_pass[i] = out.read(top + i * rows_of_pass + row_of_pass, rows);
        own_b[i] = part < ba.rank ? ba.b[(u64)of_pass[i].index * ba.b_stride + part] : 0.0f;
    }
    float4* sums = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (u32 i = 0; i < PRODUCTS; i++)
        sums[warp * TILE + i * 32 + lane] =
            make_float4(products[i][0], products[i][1], products[i][2], products[i][3]);
    __syncthreads();
    for (u32 i = threadIdx.x; i < PRODUCTS * 32; i += blockDim.x) {
        float4 sum = sums[i];
#pragma unroll 1
        for (u32 other = 1; other < warps; other++) {
            const float4 c = sums[other * TILE + i];
            sum = make_float4(sum.x + c.x, sum.y + c.y, sum.z + c.z, sum.w + c.w);
        }
        sums[i] = sum;
    }
    __syncthreads();

    const float* sum = reinterpret_cast<const float*>(shared);
    float gram[16];
#pragma unroll
    for (u32 r = 0; r < 16; r++)
        gram[r] = r < ba.rank && part < ba.rank ? sum[place(r, OF_W * 8 + part)] : 0.0f;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = i * rows_of_pass + row_of_pass;
        if (row >= TILE_ROWS * tiles) break;
        float of_gram = 0.0f;
#pragma unroll
        for (u32 r = 0; r < 16; r++) of_gram += gram[r] * __shfl_sync(0xffffffffu, own_b[i], lane / 16 * 16 + r);
        const float of_w = part < ba.rank ? sum[place(part, row)] : 0.0f;
        const double cross = sum_over((double)of_w * own_b[i], 16);
        out.write(ba, of_pass[i], 16, cross, sum_over((double)of_gram * own_b[i], 16), [&](u32 l) {
            const u32 measured = __shfl_sync(0xffffffffu, of_pass[i].index, l);
            return measure<D>(ba, p, scaling, table, measured);
        });
    }
}

#define KERNELS(name, D)                                                                                               \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32, 1)                                                   \
        row_norm_##name(RESULT_PARAMETERS, PACKED_PARAMETERS, float factor, i32 rows, i32 tiles) {                     \
        row_norm<D>(RESULTS, FACTORS, PACKED, factor, (u32)rows, (u32)tiles);                                          \
    }
