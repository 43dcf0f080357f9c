// What happens to a vector of sums on its way to memory.
#pragma once

#include <type_traits>

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

// Below 0.6 an odd polynomial, fitted to Chebyshev nodes; above, 1 - 2 / (1 + exp(2 |x|)). Relative error 3e-7.
FASTCV_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> u = x * x, size = x < 0 ? -x : x,
                   large = fma(sigmoid(-2.0f * size), broadcast(-2.0f), broadcast(1.0f));
  constexpr float c[] = {0.02111814f, -0.05387571f, 0.1333293f, -0.33333331f};
  Vec<float> p = broadcast(-0.00627853f);
  for (int i = 0; i < 4; ++i) p = fma(p, u, broadcast(c[i]));
  return size < 0.6f ? fma(x * u, p, x) : x < 0 ? -large : large;
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
    case Activation::hardswish: return x * (clamp(x + 3.0f, 0, 6) * (1.0f / 6));
    case Activation::hardsigmoid: return clamp(x + 3.0f, 0, 6) * (1.0f / 6);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::gelu: return gelu(x);
    case Activation::tanh: return tanh(x);
  }
  return x;
}

// Activations that only bound their argument, as most do: cheaper than a switch for every vector.
struct Bounds {
  float low, high;
  bool exact;  // whether they are the activation

  explicit Bounds(Activation activation)
      : low(activation == Activation::none ? -__builtin_inff() : 0),
        high(activation == Activation::relu6 ? 6 : __builtin_inff()),
        exact(activation == Activation::none || activation == Activation::relu || activation == Activation::relu6) {}
};

// Adds bias and residual (where not null) to n lanes of `sum`, and stores them.
FASTCV_INLINE void finish(const Conv2d& conv, Vec<float> sum, const float* bias, const float* residual, float* out,
                          int n) {
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

template <class F>
FASTCV_INLINE void for_each_vector(float* x, int vectors, F f) {
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) store(x + i * kLanes<float>, f(load(x + i * kLanes<float>)));
}

// One question for all of them, instead of one for each.
[[maybe_unused]] static void activate_all(float* x, int vectors, Activation activation, float slope) {
  const auto all = [&](auto constant) {
    for_each_vector(x, vectors,
                    [&](Vec<float> v) FASTCV_INLINE_LAMBDA { return activate(v, decltype(constant)::value, slope); });
  };
  switch (activation) {
#define FASTCV_CASE(name) \
  case Activation::name: return all(std::integral_constant<Activation, Activation::name>{})
    FASTCV_CASE(relu);
    FASTCV_CASE(relu6);
    FASTCV_CASE(leaky_relu);
    FASTCV_CASE(silu);
    FASTCV_CASE(hardswish);
    FASTCV_CASE(hardsigmoid);
    FASTCV_CASE(sigmoid);
    FASTCV_CASE(gelu);
    FASTCV_CASE(tanh);
#undef FASTCV_CASE
    case Activation::none: return;
  }
}

// Channels from c on, a vector or the n that are left, of the pixel of a map that begins at p.
FASTCV_INLINE Vec<float> load_channels(bool packed, const float* p, int64_t c, int64_t n) {
  return packed ? load_some(reinterpret_cast<const bfloat16_t*>(p) + c, n) : load_some(p + c, n);
}
FASTCV_INLINE void store_channels(bool packed, float* p, int64_t c, Vec<float> x, int64_t n) {
  packed ? store_some(reinterpret_cast<bfloat16_t*>(p) + c, x, n) : store_some(p + c, x, n);
}

// The pixels of a tile: sums of `vectors` vectors for each (which this overwrites), of which the first n channels
// exist.
[[maybe_unused]] static void finish_tile(const Conv2d& conv, float* sums, int pixels, int vectors, int64_t n,
                                         const float* residual, float* output) {
  constexpr int lanes = kLanes<float>;
  const auto each = [&](auto f) {
    for (int p = 0; p < pixels; ++p)
      for (int v = 0; v < vectors; ++v) f(p, v * lanes, sums + (p * vectors + v) * lanes, n - v * lanes);
  };
  if (residual)
    each([&](int p, int c, float* x, int64_t left) FASTCV_INLINE_LAMBDA {
      store(x, load(x) + load_channels(conv.residual.packed, residual + p * conv.residual.stride_x, c, left));
    });
  activate_all(sums, pixels * vectors, conv.activation, conv.slope);
  each([&](int p, int c, float* x, int64_t left) FASTCV_INLINE_LAMBDA {
    store_channels(conv.output.packed, output + p * conv.output.stride_x, c, load(x), left);
  });
}

}  // namespace fastcv::FASTCV_ISA
