// What happens to a vector of sums on its way to memory.
#pragma once

#include "../common/simd_exp.h"
#include "conv2d.h"

namespace fastcv::FASTCV_ISA {

FASTCV_INLINE Vec<float> sigmoid(Vec<float> x) { return 1.0f / (1.0f + exp(-x, 0.0f)); }

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
