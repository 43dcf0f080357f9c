// Transposed convolution in float32: what its kernels share.
//
// Input pixel i of an axis adds to outputs o = stride * i + dilation * k - pad, k < kernel. Written in u = o + pad =
// stride * q + r, with block q and phase r < stride, an output sums the kernel elements with dilation * k = r modulo
// stride. They are every (stride / gcd(stride, dilation))-th from a first one, and the input pixels that they meet are
// every (dilation / gcd)-th: each phase is a plain convolution with stride 1 and a small kernel, whose outputs lie
// `stride` pixels apart. No product with a zero between pixels is made, and results are written to where they belong.
//
// A transposed convolution is described by Conv2dShape and Conv2d, in which stride, pad, dilation and the sizes of the
// output are its own, and weights are [C, K / groups, KH, KW].
#pragma once

#include "../conv2d/conv2d.h"

namespace fastcv {

// Neighbouring phases of one axis that read the same input. Tap t < taps of phase first + i meets input q + base - t *
// step with kernel element kernel + i + t * kernel_step.
struct PhaseRun {
  int64_t first, count, taps;
  int64_t base, step, kernel, kernel_step;
};

struct PhaseRuns {
  PhaseRun y, x;
};

// Blocks that hold an output of the phases from `first` on: begin <= q < end.
struct BlockRange {
  int64_t begin, end;

  __attribute__((always_inline)) BlockRange(int64_t first, int64_t count, int64_t stride, int64_t pad, int64_t size) {
    const int64_t after = pad - (first + count - 1), left = size + pad - first;
    begin = after > 0 ? (after + stride - 1) / stride : 0;
    end = left > 0 ? (left + stride - 1) / stride : 0;
    if (size == 0 || end < begin) end = begin;
  }
};

}  // namespace fastcv

// As FASTCV_CONV2D_KERNEL, of the phases of `runs` together.
#define FASTCV_CONV_TRANSPOSE2D_KERNEL(name)                                                                        \
  int64_t name##_weights(const Conv2dShape& shape, const PhaseRuns& runs);                                          \
  void name##_prepare(const Conv2dShape& shape, const PhaseRuns& runs, const float* weight, const float* scale,     \
                      float* prepared);                                                                             \
  int64_t name##_tasks(const Conv2dShape& shape, const PhaseRuns& runs);                                            \
  int64_t name##_scratch(const Conv2dShape& shape, const PhaseRuns& runs);                                          \
  void name(const Conv2d& conv, const PhaseRuns& runs, int64_t begin, int64_t end, float* scratch);

FASTCV_EACH_ISA(
    // Phases side by side as output channels of one matrix product; also those without taps.
    FASTCV_CONV_TRANSPOSE2D_KERNEL(conv_transpose2d_merged)
    // One input and one output channel to a group.
    FASTCV_CONV_TRANSPOSE2D_KERNEL(conv_transpose2d_depthwise)
    // Few maps of one pixel, one group; weights are those of the layer.
    int64_t conv_transpose2d_gemv_tasks(const Conv2dShape& shape);
    int64_t conv_transpose2d_gemv_scratch(const Conv2dShape& shape);
    void conv_transpose2d_gemv(const Conv2d& conv, int64_t begin, int64_t end, float* scratch);)
