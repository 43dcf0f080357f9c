// How steps are divided among threads, and what their kernels share.
#pragma once

#include "../conv2d/conv2d_epilogue.h"
#include "steps.h"

namespace fastcv::FASTCV_ISA {

using program::Extent;
using program::StepTask;

constexpr int64_t kStepElements = 16 * 1024;  // outputs of a task: less is not worth another thread

// Tasks are bands of output rows.
FASTCV_INLINE int64_t band_rows(const Extent& out) { return max_of(1, kStepElements / max_of(1, out.w * out.c)); }
FASTCV_INLINE int64_t band_tasks(const Extent& out) {
  const int64_t rows = band_rows(out);
  return (out.n * out.h + rows - 1) / rows;
}

// f(image, y) for the rows of tasks begin <= i < end.
template <class F>
FASTCV_INLINE void each_row(const Extent& out, int64_t begin, int64_t end, const F& f) {
  const int64_t rows = band_rows(out), last = min_of(out.n * out.h, end * rows);
  for (int64_t i = begin * rows; i < last; ++i) f(i / out.h, i % out.h);
}

// f(c, n) for n channels from c on, a vector or what is left of one.
template <class F>
FASTCV_INLINE void each_vector(int64_t channels, const F& f) {
  constexpr int L = kLanes<float>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, L);
  if (c < channels) f(c, int(channels - c));
}

// The input coordinate of an output's, nearest resizing; ratio: input pixels for an output pixel.
FASTCV_INLINE int64_t nearest(int64_t at, float ratio, int64_t size) {
  return min_of(int64_t(__builtin_floorf(float(at) * ratio)), size - 1);
}

}  // namespace fastcv::FASTCV_ISA
