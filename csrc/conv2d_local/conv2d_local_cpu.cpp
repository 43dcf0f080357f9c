// Tensor shells of conv2d_local and of its two gradients.
#include "conv2d_local.h"

#include "../common/stable.h"
#include "../common/window_size.h"

namespace fastcv {
namespace {

using Sizes = std::vector<int64_t>;

constexpr int64_t kTaskWeights = 32 * 1024;  // elements read by a task, about

Sizes size_of(const Tensor& t) {
  Sizes size;
  for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
  return size;
}

Conv2dLocalShape make_shape(const Sizes& input, const Sizes& output, const Sizes& weight, const Sizes& stride,
                            const Sizes& padding, const Sizes& dilation) {
  STD_TORCH_CHECK(input.size() == 4 && output.size() == 4, "input, grad: expected shapes [N, C, H, W], [N, K, OH, OW]");
  STD_TORCH_CHECK(weight.size() == 6, "weight: expected shape [OH, OW, K, C, KH, KW]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected two numbers each");
  const Conv2dLocalShape s{input[0],  input[1],  input[2],  input[3],   weight[0],  weight[1],   weight[2],  weight[4],
                           weight[5], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  STD_TORCH_CHECK(
      is_window(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h) &&
          is_window(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w),
      "weight, stride, dilation: expected positive sizes; padding: numbers that are not negative; all and the "
      "reach of the kernel below 2^31");
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t step, int64_t pad, int64_t dilation) {
    const int64_t rest = in + 2 * pad - dilation * (kernel - 1) - 1;
    return rest >= 0 && out == rest / step + 1;
  };
  STD_TORCH_CHECK(weight[3] == s.channels &&
                      fits(s.height, s.out_height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h) &&
                      fits(s.width, s.out_width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w),
                  "weight: expected [OH, OW, K, ", s.channels, ", KH, KW] with OH x OW as the input of ", s.height,
                  " x ", s.width, " gives");
  STD_TORCH_CHECK(output[0] == s.images && output[1] == s.out_channels && output[2] == s.out_height &&
                      output[3] == s.out_width,
                  "grad: expected shape [", s.images, ", ", s.out_channels, ", ", s.out_height, ", ", s.out_width, "]");
  return s;
}

// f(begin, end, scratch) over the output pixels.
template <class T, class F>
void each_pixel(const Conv2dLocalShape& s, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, s.out_channels * s.depth()));
  parallel_dynamic(s.pixels(), grain, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate_scratch<accumulate_t<T>>(FASTCV_PICK(conv2d_local_scratch<T>)(s));
    f(begin, end, scratch.get());
  });
}

void check_type(const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": expected the dtype of the other tensor");
}

Tensor conv2d_local_cpu(const Tensor& input, const Tensor& weight_any, const Sizes& stride, const Sizes& padding,
                        const Sizes& dilation) {
  check_type(weight_any, "weight", input);
  STD_TORCH_CHECK(input.dim() == 4 && weight_any.dim() == 6, "weight: expected shape [OH, OW, K, C, KH, KW]");
  const Sizes size{input.size(0), weight_any.size(2), weight_any.size(0), weight_any.size(1)};
  const Conv2dLocalShape s = make_shape(size_of(input), size, size_of(weight_any), stride, padding, dilation);
  const Tensor weight = torch::stable::contiguous(weight_any);
  Tensor output = empty_cpu({size[0], size[1], size[2], size[3]}, input.scalar_type(), memory_format(input));
  if (output.numel() == 0) return output;
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const Conv2dLocal<T> task{s, feature_map<const T>(input), {}, data<T>(weight)};
    const FeatureMap<T> to = feature_map<T>(output);
    each_pixel<T>(s, [&](int64_t begin, int64_t end, accumulate_t<T>* scratch) {
      FASTCV_PICK(conv2d_local_forward<T>)(task, begin, end, to, scratch);
    });
  });
  return output;
}

Tensor conv2d_local_input_backward_cpu(const Tensor& grad, const Tensor& weight_any, const Sizes& input_size,
                                       const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  check_type(weight_any, "weight", grad);
  STD_TORCH_CHECK(input_size.size() == 2 && weight_any.dim() == 6 && grad.dim() == 4,
                  "input_size: expected two numbers");
  const Sizes size{grad.size(0), weight_any.size(3), input_size[0], input_size[1]};
  const Conv2dLocalShape s = make_shape(size, size_of(grad), size_of(weight_any), stride, padding, dilation);
  const Tensor weight = torch::stable::contiguous(weight_any);
  Tensor output = empty_cpu({size[0], size[1], size[2], size[3]}, grad.scalar_type(), memory_format(grad));
  if (output.numel() == 0) return output;
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const ScalarType sums = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor patches = empty_cpu({s.pixels(), s.images, s.depth()}, sums);
    const Conv2dLocal<T> task{s, {}, feature_map<const T>(grad), data<T>(weight)};
    const FeatureMap<T> to = feature_map<T>(output);
    each_pixel<T>(s, [&](int64_t begin, int64_t end, A*) {
      FASTCV_PICK(conv2d_local_patch_gradient<T>)(task, begin, end, mutable_data<A>(patches));
    });
    parallel_dynamic(s.images * s.channels, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_scratch<A>(FASTCV_PICK(conv2d_local_scratch<T>)(s));
      FASTCV_PICK(conv2d_local_fold<T>)(s, data<A>(patches), begin, end, to, scratch.get());
    });
  });
  return output;
}

Tensor conv2d_local_weight_backward_cpu(const Tensor& grad, const Tensor& input, const Sizes& kernel_size,
                                        const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  check_type(input, "input", grad);
  STD_TORCH_CHECK(kernel_size.size() == 2 && input.dim() == 4 && grad.dim() == 4, "kernel_size: expected two numbers");
  const Sizes size{grad.size(2), grad.size(3), grad.size(1), input.size(1), kernel_size[0], kernel_size[1]};
  const Conv2dLocalShape s = make_shape(size_of(input), size_of(grad), size, stride, padding, dilation);
  Tensor gradient = empty_cpu({size[0], size[1], size[2], size[3], size[4], size[5]}, grad.scalar_type());
  if (gradient.numel() == 0) return gradient;
  if (s.images == 0) return torch::stable::zero_(gradient);
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const Conv2dLocal<T> task{s, feature_map<const T>(input), feature_map<const T>(grad), nullptr};
    each_pixel<T>(s, [&](int64_t begin, int64_t end, accumulate_t<T>* scratch) {
      FASTCV_PICK(conv2d_local_weight_gradient<T>)(task, begin, end, mutable_data<T>(gradient), scratch);
    });
  });
  return gradient;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("conv2d_local", TORCH_BOX(&fastcv::conv2d_local_cpu));
  m.impl("conv2d_local_input_backward", TORCH_BOX(&fastcv::conv2d_local_input_backward_cpu));
  m.impl("conv2d_local_weight_backward", TORCH_BOX(&fastcv::conv2d_local_weight_backward_cpu));
}
