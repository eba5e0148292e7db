// The activations of gated products, each with its derivative.

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// An activation and its derivative.
struct Act {
    float value;
    float slope;
};

struct Silu {
    static __device__ __forceinline__ Act at(float x) {
        const float s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
};

// 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3). Beyond 12 the sigmoid is 0 or 1 in f32, and
// the clamped cube keeps 0 * infinity away.
struct GeluTanh {
    static __device__ __forceinline__ Act at(float x) {
        const float t = fminf(fmaxf(x, -12.0f), 12.0f);
        const float s = sigmoid(1.5957691216f * (t + 0.044715f * t * t * t));
        const float inner = 1.5957691216f * (1.0f + 0.134145f * t * t);
        return {x * s, s + x * s * (1.0f - s) * inner};
    }
};
