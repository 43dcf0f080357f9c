// Position-sensitive RoI pooling (Dai et al., "R-FCN", NIPS 2016, section 3): every bin has channels of its own. Bin
// (ph, pw) of output channel c is a weighted sum over pixels of input channel (c * PH + ph) * PW + pw.
//
// ps_roi_align and ps_roi_pool are the same sum with other taps: those of RoIAlign (../roi_align/roi_align.h), or the
// plain mean over whole pixels.
#pragma once

#include "../roi_align/roi_align.h"

namespace fastcv {

// One axis of one region, divided into whole pixels. Corners are scaled and rounded, the second one is not part of the
// region, and neither is the last pixel of the map: R-FCN's own rounding, which torchvision shares.
template <class Coordinate>
struct MeanAxis {
  Coordinate start, bin;
  int64_t most;  // taps in a bin: 0 for a region with an infinite or NaN coordinate

  MeanAxis(Coordinate low, Coordinate high, Coordinate scale, int64_t bins) {
    start = std::round(low * scale);
    const Coordinate end = std::round(high * scale), extent = end - start > 1 ? end - start : 1;
    bin = extent / Coordinate(bins);
    const bool finite = std::abs(start) <= Coordinate(1e9) && std::abs(end) <= Coordinate(1e9);
    // Both bounds are rounded to pixels; far away they are also rounded to what the type can hold.
    most = finite ? int64_t(std::ceil(bin)) + 2 + int64_t((std::abs(start) + extent) * Coordinate(1e-6)) : 0;
  }

  int64_t taps_per_bin(int64_t size) const { return most < size ? most : size; }
};

template <class Coordinate, class W>
Tap<W>* append_taps(const MeanAxis<Coordinate>& axis, int64_t bins, int64_t size, Tap<W>* taps, Tap<W>* base,
                    int32_t* begin) {
  const auto clip = [&](Coordinate x) {
    return x > 0 ? (x < Coordinate(size - 1) ? int32_t(x) : int32_t(size - 1)) : 0;
  };
  for (int64_t p = 0; p < bins; ++p) {
    begin[p] = int32_t(taps - base);
    if (axis.most == 0 || size == 0) continue;
    const int32_t first = clip(std::floor(Coordinate(p) * axis.bin) + axis.start);
    const int32_t end = clip(std::ceil(Coordinate(p + 1) * axis.bin) + axis.start);
    for (int32_t i = first; i < end; ++i) *taps++ = {i, W(1) / W(end - first)};
  }
  begin[bins] = int32_t(taps - base);
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
