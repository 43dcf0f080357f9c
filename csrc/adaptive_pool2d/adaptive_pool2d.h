// Adaptive pooling: as many bins as asked for, whatever the size of the map. Bin o of `bins` has the pixels
// floor(o * size / bins) to ceil((o + 1) * size / bins), exclusive, so that bins may share a pixel.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

struct AdaptiveAxis {
  int64_t input, bins;

  int64_t begin(int64_t o) const { return o * input / bins; }
  int64_t end(int64_t o) const { return ((o + 1) * input + bins - 1) / bins; }
};

template <class T>
struct AdaptivePool {
  AdaptiveAxis y, x;
  FeatureMap<const T> input;
  T* output;         // [N, C, bins, bins], dense
  int64_t* indices;  // y * W + x of the maxima; null for means
  int64_t stride_n, stride_c, stride_bin;

  // Of a block of channels of a contiguous map in scratch: rows of the map, a power of two, as many as the first-level
  // cache holds; rows of bins, enough to be written as vectors.
  int64_t rows_held() const {
    int64_t rows = 16;
    while (rows > 2 && rows * input.width > 512) rows /= 2;
    return rows;
  }
  int64_t bin_rows_held() const { return x.bins < 64 ? 64 / x.bins : 1; }
  int64_t scratch_vectors() const {
    return rows_held() * input.width + bin_rows_held() * x.bins + (indices ? x.bins : 0);
  }
};

template <class T>
struct AdaptiveAvgBackward {
  AdaptiveAxis y, x;
  FeatureMap<T> output;  // dense
  const T* grad;
  int64_t stride_n, stride_c, stride_bin;
};

// Where a channels-last map has few rows of bins, a task takes so many of its channels.
constexpr int64_t kAdaptiveChannels = 256;

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Row oy of bins of channels begin <= c < end of one image of a channels-last map.
    template <class T> void adaptive_pool2d_channels_last(const AdaptivePool<T>& task, int64_t image, int64_t oy,
                                                          int64_t begin, int64_t end);
    // Rows begin <= oy < end of bins of up to a vector of channels from `channel` on of a contiguous map.
    template <class T> void adaptive_pool2d_packed(const AdaptivePool<T>& task, int64_t image, int64_t channel,
                                                   int64_t begin, int64_t end, accumulate_t<T>* scratch);
    // Means of whole planes begin <= n * C + c < end of a contiguous map with dense planes.
    template <class T> void global_avg_pool2d(const AdaptivePool<T>& task, int64_t begin, int64_t end);
    // Write the gradient: rows begin <= image * H + y < end of a channels-last map; planes begin <= n * C + c < end of
    // a contiguous one, with scratch of bins of a column times W.
    template <class T>
    void adaptive_avg_pool2d_backward_channels_last(const AdaptiveAvgBackward<T>& task, int64_t begin, int64_t end);
    template <class T> void adaptive_avg_pool2d_backward_contiguous(const AdaptiveAvgBackward<T>& task, int64_t begin,
                                                                    int64_t end, accumulate_t<T>* scratch);
    template <class T> int adaptive_pool2d_block_channels();)
