// Precise RoI pooling (Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", ECCV 2018,
// section 3.2): a bin is the mean of the interpolated map over its area, an integral where RoIAlign takes samples.
//
// The interpolated map is a sum over pixels (y, x) of f[y, x] hat(v - y) hat(u - x), with hat(t) = max(0, 1 - |t|), so
// that the mean over a bin is a sum of products of a vertical and a horizontal factor, the means of hats: taps, as
// RoIAlign's (../roi_align/roi_align.h), whose kernels serve. A bin's mean is a smooth function of the region's
// corners, and its derivatives by them are such sums with other taps.
#pragma once

#include "../roi_align/roi_align.h"

namespace fastcv {

// What taps give: the mean over a bin, or its derivative by the lower or the higher coordinate of the region.
enum class AxisPart { mean, by_low, by_high };

// Of the whole region: the mean, or its derivative by x1, y1, x2 or y2.
struct PreciseParts {
  AxisPart rows, columns;

  static constexpr int64_t kMost = 4;
  explicit PreciseParts(int64_t part)
      : rows(part == 2 ? AxisPart::by_low : part == 4 ? AxisPart::by_high : AxisPart::mean),
        columns(part == 1 ? AxisPart::by_low : part == 3 ? AxisPart::by_high : AxisPart::mean) {}
};

// One axis of one region; its samples are pixels.
template <class Coordinate>
struct PreciseAxis {
  Coordinate start, bin, scale;
  int64_t bins, most;  // most: taps in a bin; 0 for a region without extent, or with an infinite or NaN coordinate
  AxisPart part;

  FASTCV_HOST_DEVICE PreciseAxis(Coordinate low, Coordinate high, Coordinate scale, int64_t bins, AxisPart part)
      : scale(scale), bins(bins), part(part) {
    start = low * scale;
    const Coordinate extent = high * scale - start;
    bin = extent / Coordinate(bins);
    const bool exists = std::abs(start) <= Coordinate(1e9) && bin > 0 && extent <= Coordinate(1e9);
    // Far away the ends of bins are rounded to what the type can hold.
    most = exists ? int64_t(std::ceil(bin)) + 3 + int64_t((std::abs(start) + extent) * Coordinate(1e-6)) : 0;
  }

  FASTCV_HOST_DEVICE int64_t taps_per_bin(int64_t size) const { return most < size ? most : size; }

  // Of bin p the pixels from *first to *last, without *last: those whose hats it meets.
  FASTCV_HOST_DEVICE void sample_range(int64_t p, int64_t size, int64_t* first, int64_t* last) const {
    *first = *last = 0;
    if (most == 0) return;
    *first = clip(std::floor(edge(p)), size);
    *last = clip(std::ceil(edge(p + 1)) + 1, size);
  }

  // The pixels of all bins, from *first to *last; none where *last is smaller.
  FASTCV_HOST_DEVICE void extent(int64_t all, int64_t size, int32_t* first, int32_t* last) const {
    int64_t low, high, unused;
    sample_range(0, size, &low, &unused);
    sample_range(all - 1, size, &unused, &high);
    *first = int32_t(low), *last = int32_t(high - 1);
  }

  FASTCV_HOST_DEVICE Coordinate weight(int64_t p, int64_t pixel) const {
    const Coordinate a = edge(p) - Coordinate(pixel), b = edge(p + 1) - Coordinate(pixel);
    const Coordinate width = b - a;  // not bin: of a small one the ends are rounded
    if (!(width > 0)) return part == AxisPart::mean ? hat(a) : 0;
    const Coordinate mean = (integral(a, b, -1, 0) + integral(a, b, 0, 1)) / width;
    if (part == AxisPart::mean) return mean;
    // By the ends of the bin, which move with the region's coordinates.
    const Coordinate by_a = (mean - hat(a)) / width, by_b = (hat(b) - mean) / width;
    const Coordinate to_a = Coordinate(p) / Coordinate(bins), to_b = Coordinate(p + 1) / Coordinate(bins);
    return scale * (part == AxisPart::by_high ? by_a * to_a + by_b * to_b : by_a * (1 - to_a) + by_b * (1 - to_b));
  }

 private:
  FASTCV_HOST_DEVICE Coordinate edge(int64_t p) const { return start + Coordinate(p) * bin; }

  FASTCV_HOST_DEVICE static int64_t clip(Coordinate x, int64_t size) {
    return x > 0 ? (x < Coordinate(size) ? int64_t(x) : size) : 0;
  }
  FASTCV_HOST_DEVICE static Coordinate hat(Coordinate t) {
    const Coordinate height = 1 - std::abs(t);
    return height > 0 ? height : 0;
  }
  // Of the hat over the part of [a, b] within [left, right], where it is linear.
  FASTCV_HOST_DEVICE static Coordinate integral(Coordinate a, Coordinate b, Coordinate left, Coordinate right) {
    const Coordinate low = a > left ? a : left, high = b < right ? b : right;
    return high > low ? (high - low) * hat((low + high) / 2) : 0;
  }
};

// Appends the taps of pixels i to `last` of bin p at `taps`; returns their end.
template <class Coordinate, class W>
FASTCV_HOST_DEVICE Tap<W>* append_samples(const PreciseAxis<Coordinate>& axis, int64_t p, int64_t, int64_t i,
                                          int64_t last, Tap<W>* taps) {
  for (; i < last; ++i) *taps++ = {int32_t(i), W(axis.weight(p, i))};
  return taps;
}

}  // namespace fastcv
