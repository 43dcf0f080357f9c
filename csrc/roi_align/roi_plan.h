// What the RoIAlign shells prepare: checked regions in the order of visit, with their taps.
#pragma once

#include <vector>

#include "../common/radix_sort.h"
#include "../common/stable.h"
#include "roi_align.h"

namespace fastcv {

struct RoiLevel {
  int64_t height, width;
  double scale;
};

struct RoiGeometry {
  std::vector<RoiLevel> levels;
  int64_t images, pooled_height, pooled_width, sampling_ratio = 0;
  double offset = 0;                // subtracted from scaled coordinates: half a pixel where aligned
  bool at_least_one_pixel = false;  // regions under a pixel are widened to one
  int64_t canonical_scale = 0, canonical_level = 0;  // with several levels
};

template <class W>
struct RoiPlan {
  std::vector<RoiTaps<W>> rois;   // by level, image, then place
  std::vector<int64_t> group;     // [levels * images + 1] bounds of the regions of each level and image
  std::vector<int32_t> begins;
  Scratch<Tap<W>> taps;
  int64_t total_taps = 0;         // products of row and column taps over all bins: the work per channel
};

inline int64_t roi_image(double value, int64_t row, int64_t images) {
  STD_TORCH_CHECK(value >= 0 && value < double(images), "boxes: row ", row, " has batch index ", value,
                  ", expected 0 to ", images - 1, " (the input holds ", images, " images)");
  return int64_t(value);
}

// Where a region is, on a coarse grid of its level: regions that read the same pixels are visited together.
template <class C>
uint64_t place_key(const C* roi, double scale) {
  const auto cell = [&](C a, C b) {
    const double v = 0.5 * (double(a) + double(b)) * scale / 16;
    return uint64_t(v > 0 ? (v < 4095 ? v : 4095) : 0);
  };
  return cell(roi[2], roi[4]) << 12 | cell(roi[1], roi[3]);
}

template <class W, class C, class MakeAxis>
RoiPlan<W> plan_rois_typed(const C* rois, int64_t count, const RoiGeometry& g, const MakeAxis& make_axis) {
  RoiPlan<W> plan;
  std::vector<Keyed<uint64_t>> order(count);
  std::vector<int32_t> level_of(count);
  STD_TORCH_CHECK(count < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 regions, got ", count);
  plan.group.assign(g.levels.size() * g.images + 1, 0);
  for (int64_t k = 0; k < count; ++k) {
    const C* roi = rois + 5 * k;
    const int64_t image = roi_image(double(roi[0]), k, g.images);
    level_of[k] = roi_level(roi, int32_t(g.levels.size()) - 1, g.canonical_scale, g.canonical_level,
                            [&](int32_t i) { return std::round(-std::log2(g.levels[i].scale)); });
    const uint64_t group = uint64_t(level_of[k] * g.images + image);
    order[k] = {group << 24 | place_key(roi, g.levels[level_of[k]].scale), int32_t(k)};
    ++plan.group[group + 1];
  }
  for (size_t i = 1; i < plan.group.size(); ++i) plan.group[i] += plan.group[i - 1];
  radix_sort(order);

  const auto axis = [&](const C* roi, int from, double scale, int64_t bins) {
    return make_axis(roi[from], roi[from + 2], C(scale), bins, from == 2);
  };
  std::vector<int64_t> start(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const C* roi = rois + 5 * order[i].row;
    const RoiLevel& level = g.levels[level_of[order[i].row]];
    const int64_t y = axis(roi, 2, level.scale, g.pooled_height).taps_per_bin(level.height) * g.pooled_height;
    const int64_t x = axis(roi, 1, level.scale, g.pooled_width).taps_per_bin(level.width) * g.pooled_width;
    STD_TORCH_CHECK(x + y < std::numeric_limits<int32_t>::max(), "output_size: too large for the map");
    start[i + 1] = start[i] + x + y;
  }
  plan.taps = allocate_scratch<Tap<W>>(start[count]);
  const int64_t bounds = g.pooled_height + g.pooled_width + 2;
  plan.begins.resize(count * bounds);
  plan.rois.resize(count);
  std::atomic<int64_t> total{0};
  parallel_for(count, 64, [&](int64_t first, int64_t last) {
    int64_t sum = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = order[i].row;
      const C* roi = rois + 5 * row;
      const RoiLevel& level = g.levels[level_of[row]];
      Tap<W>* const base = plan.taps.get() + start[i];
      int32_t* const begin = plan.begins.data() + i * bounds;
      Tap<W>* end =
          append_taps(axis(roi, 2, level.scale, g.pooled_height), g.pooled_height, level.height, base, base, begin);
      const int64_t rows = end - base;
      end = append_taps(axis(roi, 1, level.scale, g.pooled_width), g.pooled_width, level.width, end, base,
                        begin + g.pooled_height + 1);
      sum += rows * (end - base - rows);
      plan.rois[i] = {base, begin, row, level_of[row], int32_t(roi_image(double(roi[0]), row, g.images))};
    }
    total += sum;
  });
  plan.total_taps = total;
  return plan;
}

// Coordinates are double where the regions or the features are, float otherwise: half types are too coarse for pixels.
// make_axis(low, high, scale, bins, is_vertical) gives one axis of a region, of which append_taps() makes taps.
template <class W, class MakeAxis>
RoiPlan<W> plan_rois(const Tensor& boxes, const RoiGeometry& g, const MakeAxis& make_axis) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes: expected shape [K, 5]");
  STD_TORCH_CHECK(g.pooled_height > 0 && g.pooled_width > 0, "output_size: expected at least 1 x 1, got ",
                  g.pooled_height, " x ", g.pooled_width);
  STD_TORCH_CHECK(g.sampling_ratio <= 1 << 30, "sampling_ratio: expected at most 2^30, got ", g.sampling_ratio);
  if (std::is_same_v<W, double> || boxes.scalar_type() == ScalarType::Double) {
    const Tensor rois = as_contiguous(boxes, ScalarType::Double);
    return plan_rois_typed<W>(data<double>(rois), rois.size(0), g, make_axis);
  }
  const Tensor rois = as_contiguous(boxes, ScalarType::Float);
  return plan_rois_typed<W>(data<float>(rois), rois.size(0), g, make_axis);
}
template <class W>
RoiPlan<W> plan_rois(const Tensor& boxes, const RoiGeometry& g) {
  return plan_rois<W>(boxes, g, [&]<class C>(C low, C high, C scale, int64_t bins, bool) {
    return RoiAxis<C>(low, high, scale, C(g.offset), g.at_least_one_pixel, bins, g.sampling_ratio);
  });
}

}  // namespace fastcv
