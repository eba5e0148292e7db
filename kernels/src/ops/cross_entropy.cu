// One block per row. The first pass reads the row once, every thread with a running maximum and a sum that is rescaled
// when the maximum grows; the second one writes the gradient over the logits. It walks backwards, so that it meets
// first what the cache still holds: a row of 128256 logits is 256 KB, one row per multiprocessor fits the L2.

constexpr int THREADS = 1024;
// Spans of eight that a thread has in flight: 64 KB per block.
constexpr int SPANS = 4;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The difference is formed first: logits near the maximum lose no digits, however large they are.
__device__ __forceinline__ float exp_of_difference(float x, float max) {
    return exp2_approx((x - max) * 1.4426950409f);
}

// A row's maximum and the sum of exp(x - max); the same bits in all threads.
struct Softmax {
    float max;
    float sum;
};

__device__ __forceinline__ Softmax softmax_of_row(const bf16* row, u32 cols, bool wide) {
    // Finite, so that a logit of -infinity counts as 0 and not as NaN.
    float max = -3.402823466e38f, sum = 0.0f;
    const u32 spans = wide ? cols / 8 : 0;
    for (u32 first = threadIdx.x; first < spans; first += THREADS * SPANS) {
        // Past the end -infinity, which counts as 0.
        uint4 w[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            w[u] = make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
            if (first + u * THREADS < spans) w[u] = reinterpret_cast<const uint4*>(row)[first + u * THREADS];
        }
        float largest = max;
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const f32x8 x = unpack8(w[u]);
#pragma unroll
            for (int i = 0; i < 8; i++) largest = fmaxf(largest, x.v[i]);
        }
        sum *= exp_of_difference(max, largest);
        max = largest;
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const f32x8 x = unpack8(w[u]);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += exp_of_difference(x.v[i], max);
        }
    }
    for (u32 c = spans * 8 + threadIdx.x; c < cols; c += THREADS) {
        const float x = to_f32(row[c]);
        const float largest = fmaxf(max, x);
        sum = sum * exp_of_difference(max, largest) + exp_of_difference(x, largest);
        max = largest;
    }
    const float all = block_max<THREADS>(max);
    return {all, block_sum<THREADS>(sum * exp_of_difference(max, all))};
}

// nll = ln sum exp(logits) - logits[target].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    cross_entropy_forward(float* nll, const bf16* logits, i32 stride, const u32* targets, i32 cols) {
    const bf16* row = logits + (i64)blockIdx.x * stride;
    const Softmax softmax = softmax_of_row(row, cols, aligned16(logits, stride));
    if (threadIdx.x == 0)
        nll[blockIdx.x] = logf(softmax.sum) + (softmax.max - to_f32(row[targets[blockIdx.x]]));
}

// The same, and logits := (softmax(logits) - [v = target]) scale.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    cross_entropy_forward_backward(float* nll, bf16* logits, i32 stride, const u32* targets, i32 cols, float scale) {
    bf16* row = logits + (i64)blockIdx.x * stride;
    const bool wide = aligned16(logits, stride);
    const u32 target = targets[blockIdx.x];
    const float target_logit = to_f32(row[target]);
    const Softmax softmax = softmax_of_row(row, cols, wide);
    const float max = softmax.max, weight = scale / softmax.sum;
    const u32 spans = wide ? (u32)cols / 8 : 0;
    for (u32 c = spans * 8 + threadIdx.x; c < (u32)cols; c += THREADS)
        row[c] = to_bf16(exp_of_difference(to_f32(row[c]), max) * weight);
    const i32 rounds = (spans + THREADS * SPANS - 1) / (THREADS * SPANS);
    for (i32 round = rounds - 1; round >= 0; round--) {
        const u32 first = round * (THREADS * SPANS) + threadIdx.x;
        f32x8 x[SPANS];
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
            const u32 i = first + u * THREADS;
            x[u] = load_span(row, 0, Span{0, i * 8, i < spans}, Wide{});
        }
#pragma unroll
        for (int u = 0; u < SPANS; u++) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[u].v[i] = exp_of_difference(x[u].v[i], max) * weight;
            if (first + u * THREADS < spans) store8(row + (first + u * THREADS) * 8, x[u]);
        }
    }
    // After the owner of the target's column has written its probability.
    __syncthreads();
    if (threadIdx.x == 0) {
        row[target] = to_bf16(exp_of_difference(target_logit, max) * weight - scale);
        nll[blockIdx.x] = logf(softmax.sum) + (max - target_logit);
    }
}
