// Regions pooled by their taps, forward and backward, on all levels: which taps those are does not matter here.
#pragma once

#include "roi_plan.h"
#include "roi_tensors.h"

namespace fastcv {

// Packing the windows of few regions touches scattered memory; packing the whole map streams.
constexpr int64_t kWindowPenalty = 2;

// Pixels that a region reads, as rows x columns, plus its taps.
template <class W>
int64_t window_scratch(const RoiTaps<W>& roi, const RoiGeometry& g, int64_t map_width) {
  const int64_t y_taps = roi.begin[g.pooled_height], taps = roi.begin[g.pooled_height + g.pooled_width + 1];
  int64_t left = map_width, right = -1;
  for (int64_t b = y_taps; b < taps; ++b) {
    left = std::min<int64_t>(left, roi.taps[b].index);
    right = std::max<int64_t>(right, roi.taps[b].index);
  }
  return taps + y_taps * std::max<int64_t>(0, right - left + 1);
}

template <class T>
void pool_regions(const std::vector<Tensor>& inputs, const RoiPlan<accumulate_t<T>>& plan, const RoiGeometry& g,
                  const Tensor& output) {
  using A = accumulate_t<T>;
  std::vector<FeatureMap<const T>> maps;
  bool channels_last = output.stride(1) == 1;
  for (const Tensor& input : inputs) {
    maps.push_back(feature_map<const T>(input));
    channels_last &= input.stride(1) == 1;
  }
  const int64_t count = output.size(0), channels = inputs[0].size(1), bins = g.pooled_height * g.pooled_width;
  const bool stream = output.stride(1) == bins && exceeds_caches<T>(output);
  const RoiAlignForward<T> task{maps.data(),      plan.rois.data(),        g.pooled_height,
                                g.pooled_width,   mutable_data<T>(output), output.stride(0),
                                output.stride(1), output.stride(3),        stream};
  if (channels_last) {
    parallel_dynamic(count, 8, [&](int64_t begin, int64_t end) {
      FASTCV_PICK(roi_align_channels_last<T>)(task, begin, end);
    });
    return;
  }
  const int64_t lanes = FASTCV_PICK(roi_align_block_channels<T>)(), blocks = (channels + lanes - 1) / lanes;
  // Of all levels and images in one go, so that threads wait for each other once. A task is a block of channels of one
  // level and image, or of one region where packing its window is cheaper than packing the map.
  struct Group {
    int64_t first, last, first_task;
    bool windowed;
  };
  std::vector<Group> groups;
  int64_t tasks = 0, most_scratch = 0;
  for (size_t group = 0; group + 1 < plan.group.size(); ++group) {
    const int64_t first = plan.group[group], last = plan.group[group + 1];
    if (first == last) continue;
    const FeatureMap<const T>& map = maps[group / g.images];
    const int64_t pixels = map.height * map.width;
    int64_t window_pixels = 0, largest = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t window = window_scratch(plan.rois[i], g, map.width);
      largest = std::max(largest, window);
      window_pixels += window + 16 * (window / std::max<int64_t>(1, map.width));
    }
    const bool windowed = window_pixels * kWindowPenalty < pixels;
    groups.push_back({first, last, tasks, windowed});
    tasks += (windowed ? last - first : 1) * blocks;
    most_scratch = std::max(most_scratch, (windowed ? largest : pixels) + 2 * bins);
  }
  parallel_dynamic(tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>(most_scratch * lanes);
    for (int64_t t = begin; t < end; ++t) {
      size_t k = groups.size() - 1;
      while (groups[k].first_task > t) --k;
      const int64_t i = groups[k].first + (t - groups[k].first_task) / blocks;
      const int64_t channel = (t - groups[k].first_task) % blocks * lanes;
      if (groups[k].windowed)
        FASTCV_PICK(roi_align_windowed<T>)(task, i, channel, scratch.get());
      else
        FASTCV_PICK(roi_align_packed<T>)(task, groups[k].first, groups[k].last, channel, scratch.get());
    }
  });
}

// grad: bins lie one stride apart.
template <class T>
void pool_regions_backward(const Tensor& grad, const RoiPlan<accumulate_t<T>>& plan, const RoiGeometry& g,
                           const std::vector<Tensor>& grad_inputs) {
  using A = accumulate_t<T>;
  std::vector<FeatureMap<T>> maps;
  int64_t most_pixels = 0;
  for (const Tensor& grad_input : grad_inputs) {
    maps.push_back(feature_map<T>(grad_input));
    most_pixels = std::max(most_pixels, maps.back().height * maps.back().width);
  }
  const RoiAlignBackward<T> task{maps.data(),    plan.rois.data(), g.pooled_height, g.pooled_width,
                                 data<T>(grad), grad.stride(0),   grad.stride(1),  grad.stride(3)};
  const int64_t bins = g.pooled_height * g.pooled_width, channels = grad.size(1);
  const int64_t lanes = FASTCV_PICK(roi_align_block_channels<T>)(), blocks = (channels + lanes - 1) / lanes;
  const int64_t groups = int64_t(plan.group.size()) - 1;
  // A task owns a block of channels of one image on one level, and adds its regions in order: no two threads meet.
  parallel_dynamic(groups * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>((most_pixels + bins) * lanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t group = t / blocks, channel = t % blocks * lanes;
      FASTCV_PICK(roi_align_backward_packed<T>)(task, group / g.images, group % g.images, plan.group[group],
                                                plan.group[group + 1], channel, scratch.get());
    }
  });
}

}  // namespace fastcv
