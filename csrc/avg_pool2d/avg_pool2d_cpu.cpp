// Tensor shells of average pooling and its gradient.
#include "avg_pool2d.h"

#include "../common/pool_shell.h"

namespace fastcv {
namespace {

// How many elements count along an axis, for each window. A window may stand out of the padding, and only there less.
template <class A>
std::vector<A> lengths(const PoolAxis& a, bool include_padding) {
  std::vector<A> all(a.output);
  for (int64_t o = 0; o < a.output; ++o) {
    const int64_t first = a.start(o), last = std::min(first + a.kernel, a.input + a.padding);
    all[o] = A(include_padding ? last - first : std::min(last, a.input) - std::max<int64_t>(first, 0));
  }
  return all;
}

template <class A>
struct Lengths {
  std::vector<A> rows, columns;

  Lengths(const PoolGeometry& g, bool include_padding, int64_t divisor) {
    if (divisor) {
      rows.assign(g.y.output, A(divisor)), columns.assign(g.x.output, A(1));
    } else {
      rows = lengths<A>(g.y, include_padding), columns = lengths<A>(g.x, include_padding);
    }
  }

  void invert() {
    for (std::vector<A>* all : {&rows, &columns})
      for (A& length : *all) length = 1 / length;
  }
};

Tensor avg_pool2d_cpu(const Tensor& input_any, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                      int64_t padding_h, int64_t padding_w, bool ceil_mode, bool count_include_pad, int64_t divisor) {
  constexpr int64_t dilation_h = 1, dilation_w = 1;
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  const MemoryFormat format = memory_format(input_any);
  const Tensor input = with_vectors(input_any, format);
  PoolGeometry g = pool_geometry(FASTCV_WINDOW, input.size(2), input.size(3));
  g.y.output = pooled_size(g.y, ceil_mode), g.x.output = pooled_size(g.x, ceil_mode);
  const int64_t images = input.size(0), channels = input.size(1);
  Tensor output = empty_cpu({images, channels, g.y.output, g.x.output}, input.scalar_type(), format);
  if (output.numel() == 0) return output;
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const Lengths<accumulate_t<T>> counts(g, count_include_pad, divisor);
    const AvgPool<T> task{g,
                          feature_map<const T>(input),
                          mutable_data<T>(output),
                          counts.rows.data(),
                          counts.columns.data(),
                          exceeds_caches<T>(output)};
    if (format == MemoryFormat::ChannelsLast)
      parallel_for(images * g.y.output, pool_grain(g.x.output * channels), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(avg_pool2d_channels_last<T>)(task, begin, end);
      });
    else
      parallel_for(images * channels * g.y.output, pool_grain(g.x.output), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(avg_pool2d_contiguous<T>)(task, begin, end);
      });
  });
  return output;
}

Tensor avg_pool2d_backward_cpu(const Tensor& grad_any, int64_t height, int64_t width, int64_t kernel_h,
                               int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                               int64_t padding_w, bool count_include_pad, int64_t divisor) {
  constexpr int64_t dilation_h = 1, dilation_w = 1;
  STD_TORCH_CHECK(grad_any.dim() == 4, "grad: expected shape [N, C, OH, OW]");
  PoolGeometry g = pool_geometry(FASTCV_WINDOW, height, width);
  g.y.output = grad_any.size(2), g.x.output = grad_any.size(3);
  for (const PoolAxis* a : {&g.y, &g.x})
    STD_TORCH_CHECK(a->output == windows_that_fit(*a, false) || a->output == windows_that_fit(*a, true),
                    "grad: expected ", windows_that_fit(*a, false), " or, with ceil_mode, ", windows_that_fit(*a, true),
                    " windows, got ", a->output);
  const MemoryFormat format = memory_format(grad_any);
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const Tensor grad = dense(grad_any, format);
  const int64_t images = grad.size(0), channels = grad.size(1);
  Tensor output = empty_cpu({images, channels, height, width}, grad.scalar_type(), format);
  if (output.numel() == 0) return output;
  const CoveringLists above = windows_by_pixel(g.y),
                      beside = channels_last ? windows_by_pixel(g.x) : windows_by_phase(g.x);
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    Lengths<accumulate_t<T>> counts(g, count_include_pad, divisor);
    counts.invert();
    const AvgPoolBackward<T> task{g,
                                  channels,
                                  data<T>(grad),
                                  mutable_data<T>(output),
                                  counts.rows.data(),
                                  counts.columns.data(),
                                  above.view(),
                                  beside.view(),
                                  exceeds_caches<T>(output)};
    if (channels_last)
      parallel_for(images * height, pool_grain(width * channels), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(avg_pool2d_backward_channels_last<T>)(task, begin, end);
      });
    else
      parallel_for(images * channels * height, pool_grain(width), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(avg_pool2d_backward_contiguous<T>)(task, begin, end);
      });
  });
  return output;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("avg_pool2d", TORCH_BOX(&fastcv::avg_pool2d_cpu));
  m.impl("avg_pool2d_backward", TORCH_BOX(&fastcv::avg_pool2d_backward_cpu));
}
