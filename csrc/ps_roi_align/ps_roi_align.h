// Position-sensitive RoI pooling (Dai et al., "R-FCN", NIPS 2016, section 3): every bin has channels of its own. Bin
// (ph, pw) of output channel c is a weighted sum over pixels of input channel (c * PH + ph) * PW + pw.
//
// ps_roi_align and ps_roi_pool are the same sum with other taps: those of RoIAlign (../roi_align/roi_align.h), or the
// plain mean over whole pixels.
#pragma once

#include "../roi_align/roi_align.h"

namespace fastcv {

// One axis of one region, divided into whole pixels, which are its samples. Corners are scaled and rounded, the second
// one is not part of the region, and neither is the last pixel of the map: R-FCN's own rounding, and torchvision's.
template <class Coordinate>
struct MeanAxis {
  static constexpr int kMostTaps = 1;  // of a sample
  Coordinate start, bin;
  int64_t most;  // taps in a bin: 0 for a region with an infinite or NaN coordinate

  FASTCV_HOST_DEVICE MeanAxis(Coordinate low, Coordinate high, Coordinate scale, int64_t bins) {
    start = std::round(low * scale);
    const Coordinate end = std::round(high * scale), extent = end - start > 1 ? end - start : 1;
    bin = extent / Coordinate(bins);
    const bool finite = std::abs(start) <= Coordinate(1e9) && std::abs(end) <= Coordinate(1e9);
    // Both bounds are rounded to pixels; far away they are also rounded to what the type can hold.
    most = finite ? int64_t(std::ceil(bin)) + 2 + int64_t((std::abs(start) + extent) * Coordinate(1e-6)) : 0;
  }

  FASTCV_HOST_DEVICE int64_t taps_per_bin(int64_t size) const { return most < size ? most : size; }

  // Of bin p the pixels from *first to *last, without *last.
  FASTCV_HOST_DEVICE void sample_range(int64_t p, int64_t size, int64_t* first, int64_t* last) const {
    *first = *last = 0;
    if (most == 0 || size == 0) return;
    *first = clip(std::floor(Coordinate(p) * bin) + start, size);
    *last = clip(std::ceil(Coordinate(p + 1) * bin) + start, size);
  }

  // The pixels of all bins, from *first to *last; none where *last is smaller.
  FASTCV_HOST_DEVICE void extent(int64_t bins, int64_t size, int32_t* first, int32_t* last) const {
    int64_t low, high, unused;
    sample_range(0, size, &low, &unused);
    sample_range(bins - 1, size, &unused, &high);
    *first = int32_t(low), *last = int32_t(high - 1);
  }

 private:
  FASTCV_HOST_DEVICE static int64_t clip(Coordinate x, int64_t size) {
    return x > 0 ? (x < Coordinate(size - 1) ? int64_t(x) : size - 1) : 0;
  }
};

// Appends the taps of pixels i to `last` of bin p at `taps`; returns their end.
template <class Coordinate, class W>
FASTCV_HOST_DEVICE Tap<W>* append_samples(const MeanAxis<Coordinate>& axis, int64_t p, int64_t size, int64_t i,
                                          int64_t last, Tap<W>* taps) {
  int64_t first, end;
  axis.sample_range(p, size, &first, &end);
  const W weight = end > first ? W(1) / W(end - first) : 0;
  for (; i < last; ++i) *taps++ = {int32_t(i), weight};
  return taps;
}

template <class T>
struct PsRoiAlignForward {
  FeatureMap<const T> map;  // [N, C * PH * PW, H, W]
  const RoiTaps<accumulate_t<T>>* rois;
  int64_t channels, pooled_height, pooled_width;
  T* output;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;

  int64_t bins() const { return pooled_height * pooled_width; }
};
template <class T>
struct PsRoiAlignBackward {
  FeatureMap<T> map;  // the gradient to be written
  const RoiTaps<accumulate_t<T>>* rois;
  int64_t channels, pooled_height, pooled_width;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;

  int64_t bins() const { return pooled_height * pooled_width; }
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Regions begin <= i < end where the map lies; scratch: bins * block channels.
    template <class T>
    void ps_roi_align_in_place(const PsRoiAlignForward<T>& task, int64_t begin, int64_t end, accumulate_t<T>* scratch);
    // One bin of regions begin <= i < end of one image, one block of channels, of which the whole map is packed into
    // scratch: pixels * block channels. Sums go to tiles, [end - begin][bins][block channels].
    template <class T>
    void ps_roi_align_packed(const PsRoiAlignForward<T>& task, int64_t begin, int64_t end, int64_t bin, int64_t channel,
                             accumulate_t<T>* scratch, accumulate_t<T>* tiles);
    // From tiles to the output of region i.
    template <class T>
    void ps_roi_align_unpack(const PsRoiAlignForward<T>& task, int64_t i, int64_t channel, const accumulate_t<T>* tile);
    // Writes the gradient of one bin's channels in one block of one image: all regions begin <= i < end of that image.
    // Scratch: pixels * block channels.
    template <class T>
    void ps_roi_align_backward_packed(const PsRoiAlignBackward<T>& task, int64_t image, int64_t begin, int64_t end,
                                      int64_t bin, int64_t channel, accumulate_t<T>* scratch);
    // Adds the gradient of one bin of regions begin <= i < end where the map lies; for types that accumulate in place.
    template <class T>
    void ps_roi_align_backward_in_place(const PsRoiAlignBackward<T>& task, int64_t begin, int64_t end, int64_t bin);
    template <class T> int ps_roi_align_block_channels();)
