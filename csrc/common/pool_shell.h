// What the tensor shells of pooling share: windows from a schema's numbers, output sizes, memory formats.
#pragma once

#include "pool_window.h"
#include "stable.h"

#include <array>

namespace fastcv {

// Kernel, stride, padding and dilation, each for rows and columns, as the schemas have them.
using Window = std::array<int64_t, 8>;

// One by one: a list in a schema costs as much time as the rest of a small call.
#define FASTCV_WINDOW_PARAMETERS                                                                                    \
  int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,    \
      int64_t dilation_h, int64_t dilation_w
#define FASTCV_WINDOW \
  { kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w }

inline PoolAxis pool_axis(const Window& w, int d, int64_t input) {
  return {input, 0, w[d], w[2 + d], w[4 + d], w[6 + d]};
}

// Without output sizes. Kernels count in 32 bits.
inline PoolGeometry pool_geometry(const Window& window, int64_t height, int64_t width) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kMost / width,
                  "input: expected 1 to 2^31 - 1 pixels per channel, got ", height, " x ", width);
  const PoolGeometry g{pool_axis(window, 0, height), pool_axis(window, 1, width)};
  for (const PoolAxis* a : {&g.y, &g.x})
    STD_TORCH_CHECK(a->kernel > 0 && a->stride > 0 && a->dilation > 0 && a->padding >= 0 &&
                        a->kernel <= kMost / a->dilation && a->stride <= kMost &&
                        a->padding <= (a->kernel - 1) * a->dilation,
                    "kernel_size, stride, dilation: expected positive numbers; padding: less than the kernel's reach");
  STD_TORCH_CHECK(g.y.kernel <= kMost / g.x.kernel, "kernel_size: expected fewer than 2^31 elements");
  return g;
}

// torch's rule, or 0 where no window fits. A last window that would start behind the map and its padding is left out.
inline int64_t windows_that_fit(const PoolAxis& a, bool ceil_mode) {
  const int64_t room = a.input + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
  if (room < 0 && !(ceil_mode && room + a.stride > 0)) return 0;
  const int64_t output = (room + (ceil_mode ? a.stride - 1 : 0)) / a.stride + 1;
  return ceil_mode && (output - 1) * a.stride >= a.input + a.padding ? output - 1 : output;
}
inline int64_t pooled_size(const PoolAxis& a, bool ceil_mode) {
  const int64_t output = windows_that_fit(a, ceil_mode);
  STD_TORCH_CHECK(output > 0, "kernel_size: expected a window that fits into the padded input of ", a.input, " pixels");
  return output;
}

inline int64_t pool_grain(int64_t elements_of_a_row) {
  return std::max<int64_t>(1, kPoolGrain / std::max<int64_t>(1, elements_of_a_row));
}

inline Tensor dense(const Tensor& t, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  return torch::stable::contiguous(t, format);  // itself where it is
}

// Rows of vectors: contiguous ones with pixels side by side, channels-last ones with channels side by side.
inline Tensor with_vectors(const Tensor& t, MemoryFormat format) {
  const int side = format == MemoryFormat::ChannelsLast ? 1 : 3;
  return t.stride(side) == 1 || t.size(side) == 1 ? t : dense(t, format);
}

struct CoveringLists {
  std::vector<Covering> list;
  std::vector<int32_t> begin{0};

  void end_of_one() {
    STD_TORCH_CHECK(list.size() <= size_t(std::numeric_limits<int32_t>::max()),
                    "kernel_size: expected fewer than 2^31 pairs of a pixel and a window that covers it along an axis");
    begin.push_back(int32_t(list.size()));
  }
  Coverings view() const { return {list.data(), begin.data()}; }
};

// Of each pixel of an axis, the windows that cover it, ascending.
inline CoveringLists windows_by_pixel(const PoolAxis& a) {
  CoveringLists lists;
  const int64_t span = (a.kernel - 1) * a.dilation;
  for (int64_t p = 0; p < a.input; ++p, lists.end_of_one()) {
    const int64_t at = p + a.padding, last = std::min(a.output - 1, at / a.stride);
    for (int64_t o = at > span ? (at - span + a.stride - 1) / a.stride : 0; o <= last; ++o)
      if ((at - o * a.stride) % a.dilation == 0)
        lists.list.push_back({int32_t(o), int32_t((at - o * a.stride) / a.dilation)});
  }
  return lists;
}

// The same for pixels with (p + padding) % stride == r: windows (p + padding) / stride - m, ascending. Taps that no
// window has on a pixel are left out.
inline CoveringLists windows_by_phase(const PoolAxis& a) {
  CoveringLists lists;
  const int64_t phases = a.phases(), end = a.padding + a.input;
  const int64_t before = std::max<int64_t>(0, (a.padding / a.stride - a.output + 1) * a.stride);
  const int64_t first = (before + a.dilation - 1) / a.dilation, last = std::min(a.kernel - 1, (end - 1) / a.dilation);
  std::vector<int32_t> next(size_t(phases) + 1);  // counts, then where the next tap of a phase goes
  const auto phase = [&](int64_t j) { return size_t(j * a.dilation % a.stride); };
  for (int64_t j = first; j <= last; ++j)
    ++next[phase(j) + 1];
  for (int64_t r = 0; r < phases; ++r) lists.begin.push_back(next[r + 1] += next[r]);
  lists.list.resize(next[phases]);
  for (int64_t j = last; j >= first; --j)
    lists.list[next[phase(j)]++] = {int32_t(j * a.dilation / a.stride), int32_t(j)};
  return lists;
}

}  // namespace fastcv
