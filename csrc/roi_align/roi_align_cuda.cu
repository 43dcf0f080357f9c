// RoIAlign on the device (roi_forward_cuda.h).
//
// Floor for 1000 regions of 256 channels, 7 x 7 bins, sampling ratio 2, on 200 x 272 pixels in float32: the map once,
// 56 MB, and 50 MB of output, 25 us at 4.3 TB/s; 16 taps a bin are 0.2 G multiply-adds, 7 us.
//
// A region whose batch index is no image gives NaN: to raise, as the CPU does, would wait for the device.
#include "roi_forward_cuda.h"

namespace fastcv::cuda {
namespace {

// ---- shells ---------------------------------------------------------------------------------------------------------

using Levels = std::vector<Tensor>;

Tensor run_forward(const Levels& inputs, const Tensor& boxes_any, const std::vector<double>& scales,
                   const RoiConstants& c) {
  check_regions(boxes_any, scales, inputs.size(), c);
  for (const Tensor& input : inputs)
    STD_TORCH_CHECK(input.dim() == 4 && input.size(0) == inputs[0].size(0) && input.size(1) == inputs[0].size(1) &&
                        input.scalar_type() == inputs[0].scalar_type() && input.size(2) < INT32_MAX &&
                        input.size(3) < INT32_MAX,
                    "inputs: expected 4-D maps [N, C, H, W] of one N, C and dtype");
  const Tensor output = empty_on(inputs[0], {boxes_any.size(0), inputs[0].size(1), c.pooled_height, c.pooled_width},
                                 inputs[0].scalar_type(), memory_format(inputs[0]));
  dispatch_regions(output.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    pool_regions<decltype(feature)>(inputs, make_regions<C>(inputs, boxes, scales, c), output);
  });
  return output;
}

Tensor roi_align_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                      int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  return run_forward({input}, boxes, {spatial_scale}, {pooled_height, pooled_width, sampling_ratio, aligned});
}

Tensor multiscale_roi_align_cuda(const std::vector<Tensor>& inputs, const Tensor& boxes,
                                 const std::vector<double>& spatial_scales, int64_t pooled_height, int64_t pooled_width,
                                 int64_t sampling_ratio, bool aligned, int64_t canonical_scale,
                                 int64_t canonical_level) {
  return run_forward(inputs, boxes, spatial_scales,
                     {pooled_height, pooled_width, sampling_ratio, aligned, canonical_scale, canonical_level});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("roi_align", TORCH_BOX(&fastcv::cuda::roi_align_cuda));
  m.impl("multiscale_roi_align", TORCH_BOX(&fastcv::cuda::multiscale_roi_align_cuda));
}
