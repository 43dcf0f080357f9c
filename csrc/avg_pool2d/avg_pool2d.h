// Average pooling and its gradient.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/pool_window.h"
#include "../common/types.h"

namespace fastcv {

// The mean of window (oy, ox) is its sum over rows[oy] * columns[ox], the lengths that count.
template <class T>
struct AvgPool {
  PoolGeometry geometry;
  FeatureMap<const T> input;
  T* output;  // dense
  const accumulate_t<T>* rows;
  const accumulate_t<T>* columns;
  bool stream;
};

// From windows [N, C, OH, OW] to the map [N, C, H, W], both dense and in one memory format; rows and columns have the
// reciprocals of the lengths.
template <class T>
struct AvgPoolBackward {
  PoolGeometry geometry;
  int64_t channels;
  const T* grad;
  T* output;
  const accumulate_t<T>* rows;
  const accumulate_t<T>* columns;
  Coverings above;   // windows that cover row y
  Coverings beside;  // windows that cover column x; contiguous: by phase, as for max_unpool2d
  bool stream;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Rows of the output: begin <= plane * OH + oy < end, or image * OH + oy on channels-last maps.
    template <class T> void avg_pool2d_contiguous(const AvgPool<T>& task, int64_t begin, int64_t end);
    template <class T> void avg_pool2d_channels_last(const AvgPool<T>& task, int64_t begin, int64_t end);
    // Rows of the map.
    template <class T> void avg_pool2d_backward_contiguous(const AvgPoolBackward<T>& task, int64_t begin, int64_t end);
    template <class T>
    void avg_pool2d_backward_channels_last(const AvgPoolBackward<T>& task, int64_t begin, int64_t end);)
