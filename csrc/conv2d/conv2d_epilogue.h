// What happens to a vector of sums on its way to memory.
#pragma once

#include "../common/simd_exp.h"
#include "conv2d.h"

namespace fastcv::FASTCV_ISA {

// x Phi(x), with the complementary error function as t exp(p(t) - z^2), t = 1 / (1 + z / 2); the polynomial is a fit to
// Chebyshev nodes, with a relative error of 3e-7 for all z >= 0.
FASTCV_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> z = (x < 0 ? -x : x) * 0.70710678f, t = 1.0f / fma(z, broadcast(0.5f), broadcast(1.0f));
  constexpr float c[] = {-0.80924004f, 1.43743849f, -1.04121673f, 0.181444f,   -0.12539761f,
                         0.07356514f,  0.37931883f, 0.99939358f,  -1.26548123f};
  Vec<float> p = broadcast(0.17017582f);
  for (int i = 0; i < 9; ++i) p = fma(p, t, broadcast(c[i]));
  const Vec<float> tail = t * exp(fma(-z, z, p), 0.0f) * 0.5f;  // Phi(-|x|)
  return x * (x < 0 ? tail : 1.0f - tail);
}

FASTCV_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
  return min(broadcast(high), max(broadcast(low), x));  // in this order NaN stays NaN
}

FASTCV_INLINE Vec<float> activate(Vec<float> x, Activation activation, float slope) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return max(Vec<float>{}, x);
    case Activation::relu6: return clamp(x, 0, 6);
    case Activation::leaky_relu: return x > 0 ? x : x * slope;
    case Activation::silu: return x * sigmoid(x);
    case Activation::hardswish: return x * (clamp(x + 3.0f, 0, 6) / 6.0f);
    case Activation::hardsigmoid: return clamp(x + 3.0f, 0, 6) / 6.0f;
    case Activation::sigmoid: return sigmoid(x);
    case Activation::gelu: return gelu(x);
  }
  return x;
}

// Activations that only bound their argument, as most do: cheaper than a switch for every vector.
struct Bounds {
  float low, high;
  bool exact;  // whether they are the activation

  explicit Bounds(Activation activation)
      : low(activation == Activation::none ? -__builtin_inff() : 0), high(activation == Activation::relu6 ? 6 : __builtin_inff()),
        exact(activation == Activation::none || activation == Activation::relu || activation == Activation::relu6) {}
};

// Adds bias and residual (where not null) to n lanes of `sum`, and stores them.
FASTCV_INLINE void finish(const Conv2d& conv, Vec<float> sum, const float* bias, const float* residual, float* out, int n) {
  if (n == kLanes<float>) {
    if (bias) sum += load(bias);
    if (residual) sum += load(residual);
    store(out, activate(sum, conv.activation, conv.slope));
  } else {
    if (bias) sum += load_first(bias, n);
    if (residual) sum += load_first(residual, n);
    store_first(out, activate(sum, conv.activation, conv.slope), n);
  }
}

// The same for output channel c at pixel (image, y, x).
FASTCV_INLINE void finish(const Conv2d& conv, Vec<float> sum, int64_t image, int64_t y, int64_t x, int64_t c, int n) {
  const PixelMap<const float>& residual = conv.residual;
  const PixelMap<float>& output = conv.output;
  finish(conv, sum, conv.bias ? conv.bias + c : nullptr,
         residual.data ? residual.data + image * residual.stride_n + y * residual.stride_y + x * residual.stride_x + c
                       : nullptr,
         output.data + image * output.stride_n + y * output.stride_y + x * output.stride_x + c, n);
}

}  // namespace fastcv::FASTCV_ISA
