// Tensor shells of roi_align and multiscale_roi_align: one path, the first is the case of a single level.
#include "roi_align.h"

#include "roi_plan.h"
#include "roi_tensors.h"

namespace fastcv {
namespace {

using Levels = std::vector<Tensor>;

void check_levels(const Levels& inputs, const std::vector<double>& scales) {
  STD_TORCH_CHECK(!inputs.empty() && inputs.size() == scales.size(),
                  "inputs: expected one tensor per spatial scale, got ", inputs.size(), " tensors and ", scales.size(),
                  " scales");
  for (const Tensor& input : inputs)
    STD_TORCH_CHECK(input.dim() == 4 && input.size(0) == inputs[0].size(0) && input.size(1) == inputs[0].size(1) &&
                        input.scalar_type() == inputs[0].scalar_type() &&
                        input.size(2) < std::numeric_limits<int32_t>::max() &&
                        input.size(3) < std::numeric_limits<int32_t>::max(),
                    "inputs: expected 4-D maps [N, C, H, W] of one N, C and dtype");
}

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
void forward(const Levels& inputs, const Tensor& boxes, const RoiGeometry& g, const Tensor& output) {
  using A = accumulate_t<T>;
  const RoiPlan<A> plan = plan_rois<A>(boxes, g);
  std::vector<FeatureMap<const T>> maps;
  bool channels_last = output.stride(1) == 1;
  for (const Tensor& input : inputs) {
    maps.push_back(feature_map<const T>(input));
    channels_last &= input.stride(1) == 1;
  }
  const int64_t count = boxes.size(0), channels = inputs[0].size(1), bins = g.pooled_height * g.pooled_width;
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

Tensor run_forward(const Levels& inputs, const Tensor& boxes, const RoiGeometry& g) {
  Tensor output = empty_cpu({boxes.size(0), inputs[0].size(1), g.pooled_height, g.pooled_width},
                            inputs[0].scalar_type(), memory_format(inputs[0]));
  if (boxes.size(0) == 0) return output;
  dispatch_floating(inputs[0].scalar_type(), "input",
                    [&](auto zero) { forward<decltype(zero)>(inputs, boxes, g, output); });
  return output;
}

template <class T>
void backward(const Tensor& grad, const Tensor& boxes, const RoiGeometry& g, const Levels& grad_inputs) {
  using A = accumulate_t<T>;
  const RoiPlan<A> plan = plan_rois<A>(boxes, g);
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

Levels run_backward(const Tensor& grad_any, const Tensor& boxes, const RoiGeometry& g, int64_t channels) {
  check_pooled(grad_any, "grad", boxes, channels, g.pooled_height, g.pooled_width);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = with_one_bin_stride(grad_any);
  Levels grad_inputs;
  for (const RoiLevel& level : g.levels)
    grad_inputs.push_back(empty_cpu({g.images, channels, level.height, level.width}, grad.scalar_type(), format));
  dispatch_floating(grad.scalar_type(), "grad",
                    [&](auto zero) { backward<decltype(zero)>(grad, boxes, g, grad_inputs); });
  return grad_inputs;
}

RoiGeometry geometry(const Levels& inputs, const std::vector<double>& scales, int64_t pooled_height,
                     int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  check_levels(inputs, scales);
  RoiGeometry g{{}, inputs[0].size(0), pooled_height, pooled_width, sampling_ratio, aligned ? 0.5 : 0.0, !aligned};
  for (size_t i = 0; i < inputs.size(); ++i) g.levels.push_back({inputs[i].size(2), inputs[i].size(3), scales[i]});
  return g;
}

Tensor roi_align_cpu(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                     int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  return run_forward({input}, boxes,
                     geometry({input}, {spatial_scale}, pooled_height, pooled_width, sampling_ratio, aligned));
}

Tensor roi_align_backward_cpu(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                              int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height, int64_t width,
                              int64_t sampling_ratio, bool aligned) {
  const RoiGeometry g{{{height, width, spatial_scale}}, batch_size, pooled_height, pooled_width, sampling_ratio,
                      aligned ? 0.5 : 0.0,              !aligned};
  return run_backward(grad, boxes, g, channels)[0];
}

Tensor multiscale_roi_align_cpu(const Levels& inputs, const Tensor& boxes, const std::vector<double>& spatial_scales,
                                int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                                int64_t canonical_scale, int64_t canonical_level) {
  RoiGeometry g = geometry(inputs, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned);
  g.canonical_scale = canonical_scale, g.canonical_level = canonical_level;
  return run_forward(inputs, boxes, g);
}

Levels multiscale_roi_align_backward_cpu(const Tensor& grad, const Tensor& boxes,
                                         const std::vector<double>& spatial_scales, int64_t pooled_height,
                                         int64_t pooled_width, int64_t batch_size, int64_t channels,
                                         const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                                         int64_t sampling_ratio, bool aligned, int64_t canonical_scale,
                                         int64_t canonical_level) {
  STD_TORCH_CHECK(!heights.empty() && heights.size() == widths.size() && heights.size() == spatial_scales.size(),
                  "heights, widths: expected one number per spatial scale");
  RoiGeometry g{{},       batch_size,      pooled_height,  pooled_width, sampling_ratio, aligned ? 0.5 : 0.0,
                !aligned, canonical_scale, canonical_level};
  for (size_t i = 0; i < heights.size(); ++i) g.levels.push_back({heights[i], widths[i], spatial_scales[i]});
  return run_backward(grad, boxes, g, channels);
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&fastcv::roi_align_cpu));
  m.impl("roi_align_backward", TORCH_BOX(&fastcv::roi_align_backward_cpu));
  m.impl("multiscale_roi_align", TORCH_BOX(&fastcv::multiscale_roi_align_cpu));
  m.impl("multiscale_roi_align_backward", TORCH_BOX(&fastcv::multiscale_roi_align_backward_cpu));
}
