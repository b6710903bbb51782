// Gated activations, a number at a time by the C library, so that a result depends on its two numbers alone. Compile it
// strictly.

#include <math.h>

enum { SILU, GELU, GELU_TANH, SWIGLU_CLAMPED };

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static inline float clamp(float x, float low, float high) {  // leaves NaN as it is
  return x < low ? low : x > high ? high : x;
}

static inline float gated(int kind, float gate, float up, float limit) {
  switch (kind) {
    case SILU: return gate * sigmoid(gate) * up;
    case GELU: return 0.5f * gate * (1.0f + erff(gate * 0.70710678f)) * up;
    case GELU_TANH: {
      const float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
      return 0.5f * gate * (1.0f + tanhf(inner)) * up;
    }
  }
  gate = clamp(gate, -INFINITY, limit), up = clamp(up, -limit, limit);
  return gate * sigmoid(1.702f * gate) * (up + 1.0f);
}

// out (rows, width) of gate and up (rows, 2 * width).
void slipstream_activation(int kind, const float *in, float *out, long rows, long width, float limit, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 4096)
  for (long i = 0; i < rows * width; i++) {
    const float *gate = in + i / width * 2 * width + i % width;
    out[i] = gated(kind, gate[0], gate[width], limit);
  }
}
