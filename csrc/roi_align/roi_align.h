// RoIAlign (He et al., "Mask R-CNN", ICCV 2017, section 3): each bin of a region is the mean of bilinear samples.
//
// The mathematics, shared by all kernels. The samples of a bin form a grid, and both the bilinear weights and the rule
// for samples outside the map are products of a vertical and a horizontal factor. So the mean over the grid is
//     out[ph, pw] = sum_y wy[ph][y] * sum_x wx[pw][x] * feature[y, x]
// with the weights of all samples that touch a pixel row (or column) added up once: the taps of an axis. A bin of b x b
// pixels sampled adaptively needs (b + 1)^2 taps instead of 4 b^2 sample corners, and the taps serve all channels,
// forward and backward.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

// One pixel row or column that takes part in a bin, with its weight.
template <class W>
struct Tap {
  int32_t index;
  W weight;
};

// The taps of one region. Those of vertical bin ph are taps[begin[ph]] to taps[begin[ph + 1]]; those of horizontal bin
// pw are taps[begin[PH + 1 + pw]] to taps[begin[PH + 1 + pw + 1]].
template <class W>
struct RoiTaps {
  const Tap<W>* taps;
  const int32_t* begin;
  int64_t row;  // of the region in the list of regions, and of its output
  int32_t level, image;
};

// One axis of one region, in pixels of the feature map.
template <class Coordinate>
struct RoiAxis {
  static constexpr int kMostTaps = 2;  // of a sample
  Coordinate start, bin;
  int64_t grid;  // samples per bin; 0: none (an empty or non-finite region)

  FASTCV_HOST_DEVICE RoiAxis(Coordinate low, Coordinate high, Coordinate scale, Coordinate offset,
                             bool at_least_one_pixel, int64_t bins, int64_t sampling_ratio) {
    start = low * scale - offset;
    Coordinate extent = high * scale - offset - start;
    if (at_least_one_pixel && extent < 1) extent = 1;
    bin = extent / Coordinate(bins);
    const Coordinate adaptive = std::ceil(bin);
    grid = !(std::abs(start) <= 1e30f && std::abs(extent) <= 1e30f) ? 0
           : sampling_ratio > 0                                     ? sampling_ratio
           : adaptive > 0                                           ? int64_t(adaptive < 1e9f ? adaptive : 1e9f)
                                                                    : 0;
  }

  // At most so many taps per bin on a map of `size` pixels.
  FASTCV_HOST_DEVICE int64_t taps_per_bin(int64_t size) const {
    int64_t most = 2 * grid;
    if (std::abs(bin) <= Coordinate(grid) && grid + 3 < most) most = grid + 3;  // samples at most a pixel apart
    return most < size ? most : size;
  }

  FASTCV_HOST_DEVICE Coordinate bin_start(int64_t p) const { return start + Coordinate(p) * bin; }

  // Of bin p the samples from *first to *last, without those that are surely outside the map.
  FASTCV_HOST_DEVICE void sample_range(int64_t p, int64_t size, int64_t* first, int64_t* last) const {
    *first = 0, *last = size > 0 ? grid : 0;
    if (!(bin > 0 && grid > 4)) return;
    const double step = double(bin) / double(grid), slack = 2 + 1e-5 * double(grid), at = double(bin_start(p));
    const double low = (-1 - at) / step - slack, high = (double(size) - at) / step + slack;
    if (low > 0) *first = low < double(*last) ? int64_t(low) : *last;
    if (high < double(*last)) *last = high > 0 ? int64_t(high) : 0;
  }

  // The pixels that the bins may touch, from *first to *last; none where *last is smaller. One more on each side than
  // samples can touch, for rounding.
  FASTCV_HOST_DEVICE void extent(int64_t bins, int64_t size, int32_t* first, int32_t* last) const {
    const Coordinate end = bin_start(bins), low = bin < 0 ? end : start, high = bin < 0 ? start : end;
    const Coordinate edge = Coordinate(size - 1);
    const Coordinate least = low - 2 > 0 ? low - 2 : 0, most = high + 2 < edge ? high + 2 : edge;
    *first = 0, *last = -1;
    if (grid > 0 && least <= most) *first = int32_t(least), *last = int32_t(most);
  }

  // The two pixels between which sample i of bin p lies, and how far it is from lower to higher; false: outside.
  FASTCV_HOST_DEVICE bool sample(int64_t p, int64_t i, int64_t size, int32_t* low, int32_t* high,
                                 Coordinate* fraction) const {
    Coordinate at = bin_start(p) + (Coordinate(i) + Coordinate(0.5)) * bin / Coordinate(grid);
    if (!(at >= -1 && at <= Coordinate(size))) return false;
    if (at < 0) at = 0;
    *low = int32_t(at), *high = *low + 1;
    if (*low >= size - 1) {
      *low = *high = int32_t(size - 1);
      at = Coordinate(*low);
    }
    *fraction = at - Coordinate(*low);
    return true;
  }
};

// Appends the taps of samples i to `last` of bin p at `first`; returns their end.
template <class Coordinate, class W>
FASTCV_HOST_DEVICE Tap<W>* append_samples(const RoiAxis<Coordinate>& axis, int64_t p, int64_t size, int64_t i,
                                          int64_t last, Tap<W>* const first) {
  const Coordinate inverse = axis.grid > 0 ? 1 / Coordinate(axis.grid) : 0;
  Tap<W>* taps = first;
  const auto add = [&](int32_t index, Coordinate weight) {
    for (Tap<W>* tap = taps; tap > first && tap > taps - 2;)
      if ((--tap)->index == index) {
        tap->weight += W(weight);
        return;
      }
    *taps++ = {index, W(weight)};
  };
  for (; i < last; ++i) {
    int32_t low, high;
    Coordinate fraction;
    if (!axis.sample(p, i, size, &low, &high, &fraction)) continue;
    // The further one in the direction of travel comes last, so that the next sample finds what it shares with this
    // one among the last two taps: no index appears twice in a bin, which taps_per_bin() counts on.
    if (axis.bin >= 0) {
      add(low, (1 - fraction) * inverse);
      add(high, fraction * inverse);
    } else {
      add(high, fraction * inverse);
      add(low, (1 - fraction) * inverse);
    }
  }
  return taps;
}

// Appends the taps of all bins at `taps` and their bounds at `begin` (bins + 1 numbers, relative to `base`);
// returns the end of the taps.
template <class Axis, class W>
Tap<W>* append_taps(const Axis& axis, int64_t bins, int64_t size, Tap<W>* taps, Tap<W>* base, int32_t* begin) {
  for (int64_t p = 0; p < bins; ++p) {
    begin[p] = int32_t(taps - base);
    int64_t first, last;
    axis.sample_range(p, size, &first, &last);
    taps = append_samples(axis, p, size, first, last, taps);
  }
  begin[bins] = int32_t(taps - base);
  return taps;
}

// The level of equation 1 in Lin et al. (FPN, CVPR 2017): the finest one that is coarse enough, else the last, which is
// the coarsest; a region without a positive area goes to the finest. number_of(i): -log2 of level i's scale, rounded.
// Where each level halves the one before, this is torchvision's assignment.
template <class C, class F>
FASTCV_HOST_DEVICE int32_t roi_level(const C* roi, int32_t last, int64_t canonical_scale, int64_t canonical_level,
                                     const F& number_of) {
  if (last == 0) return 0;
  const C size = std::sqrt((roi[3] - roi[1]) * (roi[4] - roi[2]));
  const C level = std::floor(C(canonical_level) + std::log2(size / C(canonical_scale)) + C(1e-6));
  for (int32_t i = 0; i < last; ++i)
    if (!(level > C(number_of(i)))) return i;
  return last;
}

// Regions of one call in the order of visit, their taps, and the tensors.
template <class T>
struct RoiAlignForward {
  const FeatureMap<const T>* levels;
  const RoiTaps<accumulate_t<T>>* rois;
  int64_t pooled_height, pooled_width;
  T* output;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  bool stream;  // the output is contiguous and larger than the caches
};
template <class T>
struct RoiAlignBackward {
  const FeatureMap<T>* levels;  // gradients to be written
  const RoiTaps<accumulate_t<T>>* rois;
  int64_t pooled_height, pooled_width;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Regions begin <= i < end on channels-last maps (stride_c == 1 in maps and output).
    template <class T> void roi_align_channels_last(const RoiAlignForward<T>& task, int64_t begin, int64_t end);
    // Channels of one image in one block of lanes; scratch: (pixels + 2 * bins) * block channels.
    template <class T> void roi_align_packed(const RoiAlignForward<T>& task, int64_t begin, int64_t end,
                                             int64_t channel, accumulate_t<T>* scratch);
    // Region i and one block of channels, packing only the pixels it reads: for few regions. Scratch:
    // (2 * bins + taps of the region + rows x columns that it reads) * block channels.
    template <class T>
    void roi_align_windowed(const RoiAlignForward<T>& task, int64_t i, int64_t channel, accumulate_t<T>* scratch);
    // Writes the gradient of one block of channels of one image: all regions begin <= i < end of that image.
    template <class T>
    void roi_align_backward_packed(const RoiAlignBackward<T>& task, int64_t level, int64_t image, int64_t begin,
                                   int64_t end, int64_t channel, accumulate_t<T>* scratch);
    // Channels in one block.
    template <class T> int roi_align_block_channels();)
