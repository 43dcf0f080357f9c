// Steps of a program that are not convolutions: what they are given, and their kernels.
#pragma once

#include "../conv2d/conv2d.h"

namespace fastcv::program {

struct Extent {
  int64_t n, c, h, w;
  bool operator==(const Extent&) const = default;
};

struct StepTask {
  Extent in, out;  // of the first input and of the output
  Extent in2;
  PixelMap<const float> a, b;  // b: of the second input, data null where there is none
  PixelMap<float> y;
  const float *scale, *shift;  // null: none
  int64_t p[9];                // as in shapes.cpp
  float eps;
  double ratio_h, ratio_w;  // of resize: input pixels for an output pixel
  Activation activation;
  float slope;
};

struct StepKernel {
  const char* name;
  int64_t (*tasks)(const StepTask&);
  void (*run)(const StepTask&, int64_t begin, int64_t end);
};

}  // namespace fastcv::program

#define FASTCV_STEP_KERNEL(name)                                      \
  int64_t step_##name##_tasks(const ::fastcv::program::StepTask&);    \
  void step_##name(const ::fastcv::program::StepTask&, int64_t begin, int64_t end);

FASTCV_EACH_ISA(
    FASTCV_STEP_KERNEL(max_pool)
    FASTCV_STEP_KERNEL(max_pool_indices)
    FASTCV_STEP_KERNEL(avg_pool)
    FASTCV_STEP_KERNEL(adaptive_avg_pool)
    FASTCV_STEP_KERNEL(add)
    FASTCV_STEP_KERNEL(mul)
    FASTCV_STEP_KERNEL(activate)
    FASTCV_STEP_KERNEL(affine)
    FASTCV_STEP_KERNEL(copy)
    FASTCV_STEP_KERNEL(interleave)
    FASTCV_STEP_KERNEL(flatten)
    FASTCV_STEP_KERNEL(resize)
    FASTCV_STEP_KERNEL(layer_norm)
    FASTCV_STEP_KERNEL(prelu)
    FASTCV_STEP_KERNEL(max_unpool))
