// Precise RoI pooling on the device, by RoIAlign's kernel with other taps (../roi_align/roi_forward_cuda.h).
//
// Floor for 1000 regions of 256 channels, 7 x 7 bins of 2 x 2 pixels, on 200 x 272 pixels in float32: the map once, 56
// MB, and 50 MB of output, 25 us at 4.3 TB/s; 9 to 16 taps a bin are 0.2 G multiply-adds, 7 us. Derivatives by the
// coordinates of regions are four such calls.
#include "prroi_pool_cuda.h"

#include "../roi_align/roi_forward_cuda.h"

namespace fastcv::cuda {
namespace {

Tensor prroi_pool_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                       int64_t pooled_width, int64_t part) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const Tensor output = empty_on(input, {boxes.size(0), input.size(1), pooled_height, pooled_width},
                                 input.scalar_type(), memory_format(input));
  dispatch_precise_regions(input, boxes, spatial_scale, pooled_height, pooled_width, part,
                           [&](auto feature, const auto& regions) {
                             pool_regions<decltype(feature)>({input}, regions, output);
                           });
  return output;
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("prroi_pool", TORCH_BOX(&fastcv::cuda::prroi_pool_cuda)); }
