// What the shells of deformable convolution share: checks, and tensors as kernels see them.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/stable.h"
#include "deform_conv2d.h"

namespace fastcv {
namespace {

inline FloatType float_type(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::f32;
    case ScalarType::Double: return FloatType::f64;
    case ScalarType::Half: return FloatType::f16;
    case ScalarType::BFloat16: return FloatType::bf16;
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Strides with those of dimensions of size 1, which mean nothing, made what they would be in a contiguous tensor.
inline void read_strides(const Tensor& tensor, int64_t* stride) {
  int64_t dense = 1;
  for (int d = 3; d >= 0; --d) {
    stride[d] = tensor.size(d) == 1 ? dense : tensor.stride(d);
    dense = stride[d] * tensor.size(d);
  }
}

inline AnyTensor any_tensor(const Tensor& tensor, const char* argument) {
  AnyTensor any{tensor.const_data_ptr(), float_type(tensor, argument), {}};
  read_strides(tensor, any.stride);
  return any;
}

struct Geometry {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups;
};

inline void check_device(const Tensor& tensor, const char* argument, const Tensor& input) {
  STD_TORCH_CHECK(tensor.device() == input.device(), argument, ": expected a tensor on the device of input");
}

inline void check_size(const Tensor& tensor, const char* argument, int64_t n, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == n && tensor.size(1) == c && tensor.size(2) == h &&
                      tensor.size(3) == w,
                  argument, ": expected shape [", n, ", ", c, ", ", h, ", ", w, "]");
}

inline DeformConv2dShape check_shape(const Tensor& input, const Tensor& weight, const Tensor& offset,
                                     const Tensor* mask, const Tensor& bias, const Geometry& g) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected shape [O, C / groups, kh, kw]");
  check_device(weight, "weight", input), check_device(offset, "offset", input), check_device(bias, "bias", input);
  if (mask) check_device(*mask, "mask", input);
  DeformConv2dShape s{};
  s.batch = input.size(0), s.channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = g.stride_h, s.stride_w = g.stride_w, s.pad_h = g.pad_h, s.pad_w = g.pad_w;
  s.dilation_h = g.dilation_h, s.dilation_w = g.dilation_w, s.groups = g.groups, s.offset_groups = g.offset_groups;
  STD_TORCH_CHECK(g.stride_h > 0 && g.stride_w > 0, "stride: expected at least 1");
  STD_TORCH_CHECK(g.pad_h >= 0 && g.pad_w >= 0, "padding: expected at least 0");
  STD_TORCH_CHECK(g.dilation_h > 0 && g.dilation_w > 0, "dilation: expected at least 1");
  STD_TORCH_CHECK(s.kernel_h > 0 && s.kernel_w > 0 && s.channels > 0, "weight: expected a kernel of at least 1x1");
  STD_TORCH_CHECK(g.groups > 0 && s.channels == g.groups * weight.size(1) && s.out_channels % g.groups == 0,
                  "groups: expected a divisor of the channels of input and output, with weight of shape [",
                  s.out_channels, ", C / groups, kh, kw], got ", g.groups);
  STD_TORCH_CHECK(g.offset_groups > 0 && s.channels % g.offset_groups == 0,
                  "offset_groups: expected a divisor of the ", s.channels, " channels, got ", g.offset_groups);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;
  const int64_t span_h = g.dilation_h * (s.kernel_h - 1) + 1, span_w = g.dilation_w * (s.kernel_w - 1) + 1;
  STD_TORCH_CHECK(std::max({s.height, s.width, g.pad_h, g.pad_w, span_h, span_w, g.stride_h, g.stride_w}) < limit,
                  "input: expected height, width, padding, stride and kernel below ", limit);
  STD_TORCH_CHECK(s.height > 0 && s.width > 0, "input: expected a height and width of at least 1");
  s.out_height = (s.height + 2 * g.pad_h - span_h) / g.stride_h + 1;
  s.out_width = (s.width + 2 * g.pad_w - span_w) / g.stride_w + 1;
  STD_TORCH_CHECK(s.height + 2 * g.pad_h >= span_h && s.width + 2 * g.pad_w >= span_w,
                  "input: expected at least the size of the kernel after padding");
  check_size(offset, "offset", s.batch, 2 * g.offset_groups * s.taps(), s.out_height, s.out_width);
  if (mask) check_size(*mask, "mask", s.batch, g.offset_groups * s.taps(), s.out_height, s.out_width);
  STD_TORCH_CHECK(bias.dim() == 1 && (bias.size(0) == s.out_channels || bias.size(0) == 0),
                  "bias: expected shape [", s.out_channels, "], or [0] for none");
  const auto is_double = [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; };
  STD_TORCH_CHECK(is_double(input) == is_double(weight) && is_double(input) == is_double(offset) &&
                      (!mask || is_double(input) == is_double(*mask)) &&
                      (bias.size(0) == 0 || is_double(input) == is_double(bias)),
                  "input: float64 does not mix with other types");
  return s;
}

// Which gradients are wanted: bits of the argument `needs`.
enum Needs : int64_t { kInput = 1, kWeight = 2, kOffset = 4, kMask = 8, kBias = 16 };

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace
}  // namespace fastcv
