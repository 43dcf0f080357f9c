// Resampling of feature maps to another size: nearest, bilinear, and "bed of nails" (values apart, zeros between).
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

// Outputs from this size on are written past the caches: 13.9 MB (256 channels of 100 x 136) take 0.53 ms of one core,
// and 1.0 to 1.3 ms with plain stores, which read each line first, unless the whole output is still in the third-level
// cache; 8.4 MB are faster with plain stores.
constexpr int64_t kInterpolateStreamBytes = int64_t(32) << 20;

// One axis of the forward pass: output o is input[low], or (1 - weight) * input[low] + weight * input[low + 1], where
// the last input stands for the one after it. Padded to whole vectors.
template <class A>
struct ResampleAxis {
  const int32_t* low;  // -1: zero
  const A* weight;     // null: one tap
};

// One axis of the backward pass: input i gets the sum of weight[k] * output[from[k]] over begin[i] <= k < begin[i + 1].
template <class A>
struct GatherAxis {
  const int32_t* begin;
  const int32_t* from;
  const A* weight;
};

// The same as a table where no input has many outputs: tap t of input i is weight[t * stride + i] * output[from[t *
// stride + i]], weight 0 where there is none. Padded to whole vectors.
template <class A>
struct TapTable {
  const int32_t* from;  // null: no table
  const A* weight;
  int64_t taps, stride;
};

// Maps are contiguous or channels-last, both alike.
template <class T>
struct Interpolate {
  FeatureMap<const T> input;
  FeatureMap<T> output;
  ResampleAxis<accumulate_t<T>> rows, columns;
  bool channels_last, zeros;  // zeros: some low are -1
  int64_t parts;              // of the output rows of an image, or of a plane of a contiguous map
  bool stream;                // the output goes past the caches
};
template <class T>
struct InterpolateBackward {
  FeatureMap<const T> grad;
  FeatureMap<T> output;  // gradient of the input
  GatherAxis<accumulate_t<T>> rows, columns;
  TapTable<accumulate_t<T>> table;  // of columns
  bool channels_last;
  int64_t parts;  // of the input rows
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Tasks begin <= t < end of planes * parts, where planes are images, or images * channels of contiguous maps.
    template <class T> int64_t interpolate_scratch(const Interpolate<T>& task);  // elements
    template <class T>
    void interpolate(const Interpolate<T>& task, int64_t begin, int64_t end, accumulate_t<T>* scratch);
    template <class T> int64_t interpolate_backward_scratch(const InterpolateBackward<T>& task);
    template <class T> void interpolate_backward(const InterpolateBackward<T>& task, int64_t begin, int64_t end,
                                                 accumulate_t<T>* scratch);)
