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

// Adds bias and residual to `sum`, n lanes of output channel c at pixel (image, y, x), and stores it.
FASTCV_INLINE void finish(const Conv2d& conv, Vec<float> sum, int64_t image, int64_t y, int64_t x, int64_t c, int n) {
  constexpr int L = kLanes<float>;
  const auto at = [&](const float* p) { return n == L ? load(p) : load_first(p, n); };
  if (conv.bias) sum += at(conv.bias + c);
  if (conv.residual.data)
    sum += at(conv.residual.data + image * conv.residual.stride_n + y * conv.residual.stride_y + x * conv.residual.stride_x + c);
  sum = activate(sum, conv.activation, conv.slope);
  float* out = conv.output.data + image * conv.output.stride_n + y * conv.output.stride_y + x * conv.output.stride_x + c;
  if (n == L)
    store(out, sum);
  else
    store_first(out, sum, n);
}

}  // namespace fastcv::FASTCV_ISA
