// The gradient of precise RoI pooling on the device, by RoIAlign's kernel with other taps
// (../roi_align/roi_backward_cuda.h): without atomics.
//
// Bytes: the gradient once for each tile that a region meets, the map once. Floor for 1000 regions of 256 channels and
// 7 x 7 bins on 200 x 272 pixels in float32, as for the forward pass, 25 us.
#include "prroi_pool_cuda.h"

#include "../roi_align/roi_backward_cuda.h"

namespace fastcv::cuda {
namespace {

Tensor prroi_pool_backward_cuda(const Tensor& grad_any, const Tensor& boxes, double spatial_scale,
                                int64_t pooled_height, int64_t pooled_width, int64_t batch_size, int64_t channels,
                                int64_t height, int64_t width, int64_t part) {
  check_pooled(grad_any, "grad", boxes, channels, pooled_height, pooled_width);
  const Tensor grad = with_one_bin_stride(grad_any);
  const Tensor map =
      empty_on(grad, {batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  dispatch_precise_regions(map, boxes, spatial_scale, pooled_height, pooled_width, part,
                           [&](auto feature, const auto& regions) {
                             pool_regions_backward<decltype(feature)>(grad, regions, {map});
                           });
  return map;
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("prroi_pool_backward", TORCH_BOX(&fastcv::cuda::prroi_pool_backward_cuda)); }
