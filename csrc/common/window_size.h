// Limits of what describes a window (of a convolution) along an axis, within which int64 holds its products and sums.
#pragma once

#include <cstdint>

namespace fastcv {

constexpr int64_t kMostOfWindow = (int64_t(1) << 31) - 1;

// Whether a stride, dilation, padding and the like is of use: from `least` on.
inline bool is_window_number(int64_t value, int64_t least) { return value >= least && value <= kMostOfWindow; }

// Pixels from the first to the last that a kernel meets; 0 where a number is out of range, or that.
inline int64_t window_reach(int64_t kernel, int64_t dilation) {
  if (!is_window_number(kernel, 1) || !is_window_number(dilation, 1)) return 0;
  const int64_t reach = dilation * (kernel - 1) + 1;
  return reach <= kMostOfWindow ? reach : 0;
}

// All that describes one axis: then sizes of outputs, of transposed convolutions as well, are computed without
// overflow.
inline bool is_window(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return is_window_number(size, 0) && window_reach(kernel, dilation) > 0 && is_window_number(stride, 1) &&
         is_window_number(pad, 0);
}

}  // namespace fastcv
