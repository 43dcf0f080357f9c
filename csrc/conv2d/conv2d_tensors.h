// What the shells of convolutions share: tensors as maps of pixels, and what comes after the sums.
#pragma once

#include <string>

#include "../common/stable.h"
#include "conv2d.h"

namespace fastcv {

inline std::vector<int64_t> size_of(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
  return size;
}

template <class T>
PixelMap<T> pixel_map(const Tensor& t) {
  T* pointer;
  if constexpr (std::is_const_v<T>)
    pointer = data<std::remove_const_t<T>>(t);
  else
    pointer = mutable_data<T>(t);
  return {pointer, t.stride(0), t.stride(2), t.stride(3)};
}

// Channels side by side: as it is where pixels have any stride, else copied.
inline Tensor with_channels_last(const Tensor& t) {
  const bool fits = (t.stride(1) == 1 || t.size(1) == 1) && t.stride(3) >= t.size(1);
  return fits ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

// How many threads a convolution of so many weights, each used for so many pixels, is worth. Waking a second one takes
// about 5 us, in which the first does this much (2 cores of Zen 4: 16 channels to as many, 8 x 8 pixels, 3x3: 18 us a
// call with two, 13 with one; 64 to 64 channels, 14 x 14 pixels, 1x1: the same).
inline int64_t threads_for(int64_t weights, int64_t pixels) {
  constexpr double kSmallWork = 1 << 19;  // multiplications and additions
  constexpr int64_t kFewWeights = 1 << 15;
  const bool small = weights <= kFewWeights && double(weights) * double(pixels) <= kSmallWork;
  return small ? 1 : torch::stable::get_num_threads();
}

// run(begin, end, scratch) over the tasks of a convolution, by as many threads as its shape says.
template <class F>
void run_tasks(const Conv2dShape& shape, int64_t tasks, int64_t scratch_size, const F& run) {
  parallel_dynamic(tasks, shape.threads > 1 ? 1 : std::max<int64_t>(tasks, 1), [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch = allocate_scratch<float>(size_t(scratch_size));
    run(begin, end, scratch.get());
  });
}

constexpr const char* kActivationNames[] = {"none",      "relu",        "relu6",   "leaky_relu", "silu",
                                            "hardswish", "hardsigmoid", "sigmoid", "gelu",       "tanh"};

inline bool is_activation(int64_t number) { return number >= 0 && number < int64_t(std::size(kActivationNames)); }

inline Activation activation_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kActivationNames); ++i)
    if (name == kActivationNames[i]) return Activation(i);
  STD_TORCH_CHECK(false, "activation: \"", name, "\" is unknown");
}

inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
}

// Bias and residual of a convolution whose shape is set, checked, and kept while it runs.
struct Epilogue {
  std::optional<Tensor> bias, residual;

  Epilogue(const std::optional<Tensor>& bias_any, const std::optional<Tensor>& residual_any, Conv2d& conv) {
    const Conv2dShape& s = conv.shape;
    if (bias_any) {
      STD_TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == s.out_channels, "bias: expected shape [",
                      s.out_channels, "]");
      bias = as_contiguous(*bias_any, ScalarType::Float);
      conv.bias = data<float>(*bias);
    }
    if (residual_any) {
      check_float(*residual_any, "residual");
      const std::vector<int64_t> size{s.images, s.out_channels, s.out_height, s.out_width};
      STD_TORCH_CHECK(residual_any->dim() == 4 && size_of(*residual_any) == size,
                      "residual: expected the shape of the output");
      residual = with_channels_last(*residual_any);
      conv.residual = pixel_map<const float>(*residual);
    }
  }
};

}  // namespace fastcv
