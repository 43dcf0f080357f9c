// Tensor shells of adaptive pooling. Gradients of maxima go through max_unpool2d.
#include "adaptive_pool2d.h"

#include "../common/pool_shell.h"

namespace fastcv {
namespace {

void check_size(int64_t size, int64_t bins) {
  STD_TORCH_CHECK(size > 0 && bins >= 0 && (bins == 0 || size < (int64_t(1) << 31) / bins),
                  "output_size: expected fewer than 2^31 / ", size, " bins on an axis of ", size, " pixels, got ",
                  bins);
}

template <class T>
void run(const AdaptivePool<T>& task, bool channels_last) {
  const FeatureMap<const T>& in = task.input;
  const int64_t pixels = in.height * in.width, bins = task.y.bins * task.x.bins;
  if (channels_last) {
    const int64_t rows = task.y.bins;
    const bool few = in.images * rows < 2 * torch::stable::get_num_threads();
    const int64_t most = few ? kAdaptiveChannels : in.channels;
    const int64_t pieces = (in.channels + most - 1) / most;
    parallel_for(in.images * rows * pieces, pool_grain(pixels / rows * std::min(in.channels, most)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t first = i % pieces * most, row = i / pieces;
                     FASTCV_PICK(adaptive_pool2d_channels_last<T>)(task, row / rows, row % rows, first,
                                                                   std::min(in.channels, first + most));
                   }
                 });
  } else if (bins == 1 && !task.indices && in.stride_y == in.width) {
    parallel_for(in.images * in.channels, pool_grain(pixels), [&](int64_t begin, int64_t end) {
      FASTCV_PICK(global_avg_pool2d<T>)(task, begin, end);
    });
  } else {
    const int64_t lanes = FASTCV_PICK(adaptive_pool2d_block_channels<T>)(), blocks = (in.channels + lanes - 1) / lanes;
    const int64_t rows = task.y.bins;
    parallel_for(in.images * blocks * rows, pool_grain(pixels * lanes / rows), [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_scratch<accumulate_t<T>>(size_t(task.scratch_vectors() * lanes));
      while (begin < end) {
        const int64_t block = begin / rows, first = begin % rows, last = std::min(rows, first + end - begin);
        FASTCV_PICK(adaptive_pool2d_packed<T>)(task, block / blocks, block % blocks * lanes, first, last,
                                               scratch.get());
        begin += last - first;
      }
    });
  }
}

std::tuple<Tensor, Tensor> pool(const Tensor& input_any, int64_t height, int64_t width, bool maximum) {
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  check_size(input_any.size(2), height), check_size(input_any.size(3), width);
  STD_TORCH_CHECK(input_any.size(2) <= std::numeric_limits<int32_t>::max() / input_any.size(3),
                  "input: expected fewer than 2^31 pixels per channel");
  const MemoryFormat format = memory_format(input_any);
  const Tensor input = with_vectors(input_any, format);
  const auto size = {input.size(0), input.size(1), height, width};
  Tensor output = empty_cpu(size, input.scalar_type(), format);
  Tensor indices = maximum ? empty_cpu(size, ScalarType::Long, format) : output;
  if (output.numel() == 0) return {output, indices};
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const int64_t channels = input.size(1), bins = height * width;
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    run(AdaptivePool<T>{{input.size(2), height},
                        {input.size(3), width},
                        feature_map<const T>(input),
                        mutable_data<T>(output),
                        maximum ? mutable_data<int64_t>(indices) : nullptr,
                        channels * bins,
                        channels_last ? 1 : bins,
                        channels_last ? channels : 1},
        channels_last);
  });
  return {output, indices};
}

Tensor adaptive_avg_pool2d_cpu(const Tensor& input, int64_t height, int64_t width) {
  return std::get<0>(pool(input, height, width, false));
}
std::tuple<Tensor, Tensor> adaptive_max_pool2d_cpu(const Tensor& input, int64_t height, int64_t width) {
  return pool(input, height, width, true);
}

Tensor adaptive_avg_pool2d_backward_cpu(const Tensor& grad_any, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad_any.dim() == 4, "grad: expected shape [N, C, OH, OW]");
  const int64_t rows = grad_any.size(2), columns = grad_any.size(3), channels = grad_any.size(1),
                images = grad_any.size(0);
  check_size(height, rows), check_size(width, columns);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = dense(grad_any, format);
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  Tensor output = empty_cpu({images, channels, height, width}, grad.scalar_type(), format);
  if (output.numel() == 0) return output;
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const int64_t bins = rows * columns;
    const AdaptiveAvgBackward<T> task{
        {height, rows},  {width, columns},         feature_map<T>(output),      data<T>(grad),
        channels * bins, channels_last ? 1 : bins, channels_last ? channels : 1};
    if (channels_last)
      parallel_for(images * height, pool_grain(width * channels), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(adaptive_avg_pool2d_backward_channels_last<T>)(task, begin, end);
      });
    else
      parallel_for(images * channels, pool_grain(height * width), [&](int64_t begin, int64_t end) {
        const auto scratch = allocate_scratch<accumulate_t<T>>(size_t(rows * width));
        FASTCV_PICK(adaptive_avg_pool2d_backward_contiguous<T>)(task, begin, end, scratch.get());
      });
  });
  return output;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&fastcv::adaptive_avg_pool2d_cpu));
  m.impl("adaptive_avg_pool2d_backward", TORCH_BOX(&fastcv::adaptive_avg_pool2d_backward_cpu));
  m.impl("adaptive_max_pool2d", TORCH_BOX(&fastcv::adaptive_max_pool2d_cpu));
}
