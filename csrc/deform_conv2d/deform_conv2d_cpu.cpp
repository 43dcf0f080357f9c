// Tensor shells of deform_conv2d and its backward pass: checks, layouts, scratch, threads.
#include <algorithm>
#include <atomic>

#include "deform_conv2d_tensors.h"

namespace fastcv {
namespace {

// The input as the kernels can read it: itself where it lies in planes or channels-last, a copy otherwise, and where it
// is one pixel wide, when there is no pair of neighbours to read.
struct ReadableInput {
  Tensor tensor;
  int64_t stride[4];
  bool channels_last;

  explicit ReadableInput(const Tensor& input) : tensor(input) {
    read_strides(tensor, stride);
    channels_last = stride[1] == 1 && (tensor.size(1) > 1 || tensor.size(3) == 1);
    if (!channels_last && stride[3] != 1) tensor = torch::stable::contiguous(tensor);
    if (!channels_last && tensor.size(3) == 1) {
      tensor = torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
      channels_last = true;
    }
    read_strides(tensor, stride);
    if (channels_last) stride[1] = 1;
  }

  template <class T>
  DeformConv2dInput<T> view() const {
    return {data<T>(tensor), {stride[0], stride[1], stride[2], stride[3]}, channels_last};
  }
};

constexpr int64_t kSampleWork = 32;  // to sample one channel, in multiplications of a matrix product

// f(item, scratch) for all items, which threads take as they get free; `work` is that of all items, in multiplications.
template <class F>
void run_items(int64_t items, int64_t work, size_t scratch_bytes, const F& f) {
  constexpr int64_t least = 1 << 18;  // makes a thread worth its start
  const int64_t threads = std::min({int64_t(torch::stable::get_num_threads()), items, work / least});
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t, int64_t) {
    const Scratch<char> scratch = allocate_scratch<char>(scratch_bytes);
    for (int64_t item; (item = next.fetch_add(1)) < items;) f(item, scratch.get());
  };
  if (threads > 1)
    parallel_for(threads, 1, run);
  else
    run(0, 1);
}

template <class T>
Tensor forward(const DeformConv2dShape& s, const Tensor& input, const Tensor& weight, const Tensor& offset,
               const Tensor* mask, const Tensor& bias) {
  using A = accumulate_t<T>;
  Tensor output = empty_cpu({s.batch, s.out_channels, s.out_height, s.out_width}, input.scalar_type(),
                            memory_format(input));
  if (output.numel() == 0) return output;
  const ReadableInput readable(input);
  const Tensor sums = as_contiguous(bias, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  DeformConv2dForward<T> conv{s,
                              readable.view<T>(),
                              any_tensor(weight, "weight"),
                              any_tensor(offset, "offset"),
                              mask ? any_tensor(*mask, "mask") : AnyTensor{},
                              bias.size(0) ? data<A>(sums) : nullptr,
                              mutable_data<T>(output),
                              is_channels_last(input),
                              4};
  // Tiles of four panels read the weights from far once for 128 pixels; fewer where threads would lack work.
  const int64_t panel = FASTCV_PICK(deform_conv2d_panel<T>)(), panels = (s.pixels() + panel - 1) / panel;
  const int64_t threads = torch::stable::get_num_threads();
  while (conv.panels > 1 && panels < 4 * conv.panels * threads) --conv.panels;
  const int64_t work = s.pixels() * s.channels * s.taps() * (kSampleWork + s.group_outputs());
  run_items((panels + conv.panels - 1) / conv.panels, work, FASTCV_PICK(deform_conv2d_forward_scratch<T>)(conv),
            [&](int64_t tile, void* scratch) {
              FASTCV_PICK(deform_conv2d_forward<T>)(conv, tile, tile + 1, scratch);
            });
  return output;
}

Tensor deform_conv2d_cpu(const Tensor& input, const Tensor& weight, const Tensor& offset, const Tensor& mask,
                         const Tensor& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                         int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t offset_groups,
                         bool use_mask) {
  const Geometry geometry{stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups};
  const Tensor* modulation = use_mask ? &mask : nullptr;
  const DeformConv2dShape s = check_shape(input, weight, offset, modulation, bias, geometry);
  Tensor output;
  dispatch_floating(input.scalar_type(), "input", [&](auto type) {
    output = forward<decltype(type)>(s, input, weight, offset, modulation, bias);
  });
  return output;
}

// A gradient that is added up in the accumulate type, and converted at the end; empty where it is not wanted.
struct Gradient {
  Tensor sum;
  ScalarType dtype;

  Gradient(const Tensor& of, bool wanted, ScalarType accumulate, MemoryFormat format = MemoryFormat::Contiguous)
      : dtype(of.scalar_type()) {
    sum = !wanted          ? empty_cpu({0}, accumulate)
          : of.dim() == 4 ? empty_cpu({of.size(0), of.size(1), of.size(2), of.size(3)}, accumulate, format)
                          : empty_cpu({of.numel()}, accumulate);
    torch::stable::zero_(sum);
  }
  template <class A>
  A* pointer() const {
    return sum.numel() ? mutable_data<A>(sum) : nullptr;
  }
  Tensor result(MemoryFormat format = MemoryFormat::Contiguous) const {
    const Tensor typed = sum.scalar_type() == dtype ? sum : torch::stable::to(sum, dtype);
    return sum.dim() == 4 ? torch::stable::contiguous(typed, format) : typed;
  }
};

// How much of a row of grad or columns a block takes: more pixels wait less for other threads, but leave the cache. Not
// a function of the number of threads, on which the result must not depend.
constexpr int64_t kBlockBytesPerRow = 4096;
// Channels that a thread takes at once.
constexpr int64_t kScatterChannels = 16, kWeightChannels = 8, kBiasOutputs = 32;

template <class T>
void run_block(const DeformConv2dBackward<T>& conv, size_t scratch_bytes) {
  const int64_t panel = FASTCV_PICK(deform_conv2d_panel<T>)();
  const int64_t channels = conv.last_channel - conv.first_channel, pixels = conv.last_pixel - conv.first_pixel;
  const int64_t samples = pixels * channels * conv.shape.taps(), outputs = conv.shape.group_outputs();
  run_items((pixels + panel - 1) / panel, samples * (kSampleWork + outputs), scratch_bytes,
            [&](int64_t item, void* scratch) {
              FASTCV_PICK(deform_conv2d_backward_panels<T>)(conv, item, item + 1, scratch);
            });
  const int64_t scatters = conv.grad_input ? (channels + kScatterChannels - 1) / kScatterChannels : 0;
  const int64_t products = conv.grad_weight ? (channels + kWeightChannels - 1) / kWeightChannels : 0;
  run_items(scatters + products, samples * (kSampleWork + outputs), scratch_bytes, [&](int64_t item, void* scratch) {
    if (item < scatters) {
      const int64_t first = item * kScatterChannels, last = std::min(first + kScatterChannels, channels);
      FASTCV_PICK(deform_conv2d_backward_input<T>)(conv, first, last, scratch);
    } else {
      const int64_t first = (item - scatters) * kWeightChannels, last = std::min(first + kWeightChannels, channels);
      FASTCV_PICK(deform_conv2d_backward_weight<T>)(conv, first, last);
    }
  });
}

template <class T>
void run_backward(DeformConv2dBackward<T>& conv) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = conv.shape;
  const int64_t pixels = kBlockBytesPerRow / int64_t(sizeof(A));
  const int64_t channels = FASTCV_PICK(deform_conv2d_backward_channels<T>)(s);
  const int64_t panel = FASTCV_PICK(deform_conv2d_panel<T>)();
  const int64_t block_pixels = std::min(pixels, (s.pixels() + panel - 1) / panel * panel);
  const DeformConv2dBackwardSizes sizes = FASTCV_PICK(deform_conv2d_backward_sizes<T>)(s);
  const Scratch<A> grad_block = allocate_scratch<A>(sizes.grad_rows * block_pixels),
                   grad_columns = allocate_scratch<A>(sizes.column_rows * block_pixels),
                   columns = allocate_scratch<A>(sizes.column_rows * block_pixels),
                   weights = allocate_scratch<A>(sizes.weights);
  conv.grad_block = grad_block.get(), conv.grad_columns = grad_columns.get();
  conv.columns = columns.get(), conv.weights = weights.get();
  const size_t scratch_bytes = FASTCV_PICK(deform_conv2d_backward_scratch<T>)(s);
  for (int64_t c = 0; c < s.channels; c = conv.last_channel) {
    const int64_t group_end = (c / s.group_channels() + 1) * s.group_channels();
    conv.first_channel = c;
    conv.last_channel = std::min(c + channels, channels < s.group_channels() ? group_end : s.channels);
    const int64_t chunks = FASTCV_PICK(deform_conv2d_weight_chunks<T>)(conv);
    run_items(chunks, chunks * kSampleWork * s.group_outputs(), 0, [&](int64_t chunk, void*) {
      FASTCV_PICK(deform_conv2d_pack_weights<T>)(conv, chunk, chunk + 1);
    });
    for (conv.first_pixel = 0; conv.first_pixel < s.pixels(); conv.first_pixel = conv.last_pixel) {
      conv.last_pixel = std::min(conv.first_pixel + pixels, s.pixels());
      run_block(conv, scratch_bytes);
    }
  }
}

template <class T>
FiveTensors backward(const DeformConv2dShape& s, const Tensor& grad, const Tensor& input, const Tensor& weight,
                     const Tensor& offset, const Tensor& mask, const Tensor& bias, bool use_mask, int64_t needs) {
  using A = accumulate_t<T>;
  const ScalarType accumulate = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  const ReadableInput readable(input);
  const Gradient grad_input(input, needs & kInput, accumulate,
                            readable.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const Gradient grad_weight(weight, needs & kWeight, accumulate), grad_offset(offset, needs & kOffset, accumulate),
      grad_mask(mask, use_mask && (needs & kMask), accumulate), grad_bias(bias, needs & kBias, accumulate);
  if (grad.numel() > 0) {
    DeformConv2dBackward<T> conv{};
    conv.shape = s;
    conv.input = readable.view<T>();
    conv.weight = any_tensor(weight, "weight"), conv.offset = any_tensor(offset, "offset");
    conv.grad = any_tensor(grad, "grad");
    if (use_mask) conv.mask = any_tensor(mask, "mask");
    conv.grad_input = grad_input.pointer<A>(), conv.grad_weight = grad_weight.pointer<A>();
    conv.grad_offset = grad_offset.pointer<A>(), conv.grad_bias = grad_bias.pointer<A>();
    conv.grad_mask = grad_mask.pointer<A>();
    if (conv.grad_input) {
      read_strides(grad_input.sum, conv.grad_input_stride);
      if (readable.channels_last) conv.grad_input_stride[1] = 1;
    }
    if (needs & (kInput | kWeight | kOffset | kMask)) run_backward(conv);
    if (conv.grad_bias)
      run_items((s.out_channels + kBiasOutputs - 1) / kBiasOutputs, s.out_channels * s.pixels(), 0,
                [&](int64_t item, void*) {
                  const int64_t first = item * kBiasOutputs, last = std::min(first + kBiasOutputs, s.out_channels);
                  FASTCV_PICK(deform_conv2d_backward_bias<T>)(conv, first, last);
                });
  }
  return {grad_input.result(memory_format(input)), grad_weight.result(), grad_offset.result(), grad_mask.result(),
          grad_bias.result()};
}

FiveTensors deform_conv2d_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                       const Tensor& offset, const Tensor& mask, const Tensor& bias, int64_t stride_h,
                                       int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                                       int64_t dilation_w, int64_t groups, int64_t offset_groups, bool use_mask,
                                       int64_t needs) {
  const Geometry geometry{stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups};
  const DeformConv2dShape s = check_shape(input, weight, offset, use_mask ? &mask : nullptr, bias, geometry);
  check_device(grad, "grad", input);
  check_size(grad, "grad", s.batch, s.out_channels, s.out_height, s.out_width);
  std::optional<FiveTensors> gradients;
  dispatch_floating(input.scalar_type(), "input", [&](auto type) {
    gradients = backward<decltype(type)>(s, grad, input, weight, offset, mask, bias, use_mask, needs);
  });
  return *gradients;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&fastcv::deform_conv2d_cpu));
  m.impl("deform_conv2d_backward", TORCH_BOX(&fastcv::deform_conv2d_backward_cpu));
}
