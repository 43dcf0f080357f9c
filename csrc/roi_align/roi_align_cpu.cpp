// Tensor shells of roi_align and multiscale_roi_align: one path, the first is the case of a single level.
#include "roi_align.h"

#include "roi_pooling.h"

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

Tensor run_forward(const Levels& inputs, const Tensor& boxes, const RoiGeometry& g) {
  Tensor output = empty_cpu({boxes.size(0), inputs[0].size(1), g.pooled_height, g.pooled_width},
                            inputs[0].scalar_type(), memory_format(inputs[0]));
  if (boxes.size(0) == 0) return output;
  dispatch_floating(inputs[0].scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    pool_regions<T>(inputs, plan_rois<accumulate_t<T>>(boxes, g), g, output);
  });
  return output;
}

Levels run_backward(const Tensor& grad_any, const Tensor& boxes, const RoiGeometry& g, int64_t channels) {
  check_pooled(grad_any, "grad", boxes, channels, g.pooled_height, g.pooled_width);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = with_one_bin_stride(grad_any);
  Levels grad_inputs;
  for (const RoiLevel& level : g.levels)
    grad_inputs.push_back(empty_cpu({g.images, channels, level.height, level.width}, grad.scalar_type(), format));
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    pool_regions_backward<T>(grad, plan_rois<accumulate_t<T>>(boxes, g), g, grad_inputs);
  });
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
