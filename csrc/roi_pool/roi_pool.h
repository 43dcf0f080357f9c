// RoI pooling (Girshick, "Fast R-CNN", ICCV 2015, section 2.1): the maximum over each bin of a region.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

// Pixels [begin, end) of one bin along one axis.
struct PixelRange {
  int32_t begin, end;
};

// One axis of one region: corners are scaled and rounded to pixels, the region includes both, and bins overlap by the
// pixel that they share. A non-finite region has no pixels.
template <class Coordinate>
struct PoolAxis {
  Coordinate start, bin;
  bool finite;

  FASTCV_HOST_DEVICE PoolAxis(Coordinate low, Coordinate high, Coordinate scale, int64_t bins) {
    const Coordinate last = std::round(high * scale);
    start = std::round(low * scale);
    finite = std::abs(start) <= Coordinate(1e9) && std::abs(last) <= Coordinate(1e9);
    const Coordinate extent = last - start + 1 > 1 ? last - start + 1 : 1;
    bin = extent / Coordinate(bins);
  }

  FASTCV_HOST_DEVICE PixelRange range(int64_t p, int64_t size) const {
    if (!finite) return {0, 0};
    return {clip(std::floor(Coordinate(p) * bin) + start, size),
            clip(std::ceil(Coordinate(p + 1) * bin) + start, size)};
  }

  // The pixels of all bins, from *first to *last; none where *last is smaller.
  FASTCV_HOST_DEVICE void extent(int64_t bins, int64_t size, int32_t* first, int32_t* last) const {
    *first = range(0, size).begin, *last = range(bins - 1, size).end - 1;
  }

 private:
  FASTCV_HOST_DEVICE static int32_t clip(Coordinate x, int64_t size) {
    return x > 0 ? (x < Coordinate(size) ? int32_t(x) : int32_t(size)) : 0;
  }
};

template <class Coordinate>
void pool_ranges(Coordinate low, Coordinate high, Coordinate scale, int64_t bins, int64_t size, PixelRange* ranges) {
  const PoolAxis<Coordinate> axis(low, high, scale, bins);
  for (int64_t p = 0; p < bins; ++p) ranges[p] = axis.range(p, size);
}

struct PoolRegion {
  const PixelRange* rows;     // [PH]
  const PixelRange* columns;  // [PW]
  int64_t row;                // of the region in the list of regions
  int32_t image;
};

template <class T>
struct RoiPoolForward {
  FeatureMap<const T> map;
  const PoolRegion* regions;
  int64_t pooled_height, pooled_width;
  T* output;        // [K, C, PH, PW]
  int32_t* argmax;  // the same: y * W + x, -1 where a bin has no pixel
  int64_t stride_roi, stride_c, stride_bin;
  bool stream;  // the output is contiguous and larger than the caches
};
template <class T>
struct RoiPoolBackward {
  FeatureMap<T> map;  // the gradient to be written, contiguous or channels-last
  const PoolRegion* regions;
  int64_t pooled_height, pooled_width;
  const T* grad;  // [K, C, PH, PW]
  int64_t grad_stride_roi, grad_stride_c, grad_stride_bin;
  const int32_t* argmax;
  int64_t argmax_stride_roi, argmax_stride_c, argmax_stride_bin;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Regions begin <= i < end on a channels-last map.
    template <class T> void roi_pool_channels_last(const RoiPoolForward<T>& task, int64_t begin, int64_t end);
    // Regions begin <= i < end, all of one image, one block of channels of which the rows [first_row, end_row) are
    // packed; scratch: (rows * width + 3 * bins) * block channels.
    template <class T> void roi_pool_packed(const RoiPoolForward<T>& task, int64_t begin, int64_t end, int64_t channel,
                                            int64_t first_row, int64_t end_row, accumulate_t<T>* scratch);
    // Write the gradient of one image from its regions begin <= i < end: planes first <= c < last of a contiguous one,
    // or rows of a channels-last one. Scratch, for types that are too coarse to add in: as many elements as are
    // written. False where argmax holds a position outside its bin's rows.
    template <class T>
    bool roi_pool_backward_planes(const RoiPoolBackward<T>& task, int64_t image, int64_t begin, int64_t end,
                                  int64_t first, int64_t last, accumulate_t<T>* scratch);
    template <class T>
    bool roi_pool_backward_rows(const RoiPoolBackward<T>& task, int64_t image, int64_t begin, int64_t end,
                                int64_t first_row, int64_t end_row, accumulate_t<T>* scratch);
    template <class T> int roi_pool_block_channels();)
