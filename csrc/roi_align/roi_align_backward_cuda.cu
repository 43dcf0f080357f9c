// The gradient of RoIAlign on the device (roi_backward_cuda.h).
//
// Bytes: the gradient once for each tile that a region meets, the map once. Floor for 1000 regions of 256 channels
// and 7 x 7 bins on 200 x 272 pixels in float32, as for the forward pass, 25 us; regions of 14 x 14 pixels meet 4 to
// 9 tiles, so that the gradient's 50 MB are read about 6 times, mostly from the second-level cache.
#include "roi_backward_cuda.h"

namespace fastcv::cuda {
namespace {

// ---- shells ---------------------------------------------------------------------------------------------------------

using Levels = std::vector<Tensor>;

struct MapSizes {
  int64_t images, channels;
  std::vector<int64_t> heights, widths;
};

Levels run_backward(const Tensor& grad_any, const Tensor& boxes_any, const std::vector<double>& scales,
                    const RoiConstants& c, const MapSizes& size) {
  check_regions(boxes_any, scales, size.heights.size(), c);
  check_pooled(grad_any, "grad", boxes_any, size.channels, c.pooled_height, c.pooled_width);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = with_one_bin_stride(grad_any);
  Levels maps;
  for (size_t i = 0; i < size.heights.size(); ++i) {
    STD_TORCH_CHECK(size.heights[i] < INT32_MAX && size.widths[i] < INT32_MAX,
                    "heights, widths: expected fewer than 2^31 - 1 pixels");
    maps.push_back(empty_on(grad, {size.images, size.channels, size.heights[i], size.widths[i]}, grad.scalar_type(),
                            format));
  }
  dispatch_regions(grad.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    pool_regions_backward<decltype(feature)>(grad, make_regions<C>(maps, boxes, scales, c), maps);
  });
  return maps;
}

Tensor roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                               int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                               int64_t width, int64_t sampling_ratio, bool aligned) {
  return run_backward(grad, boxes, {spatial_scale}, {pooled_height, pooled_width, sampling_ratio, aligned},
                      {batch_size, channels, {height}, {width}})[0];
}

Levels multiscale_roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes,
                                          const std::vector<double>& spatial_scales, int64_t pooled_height,
                                          int64_t pooled_width, int64_t batch_size, int64_t channels,
                                          const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                                          int64_t sampling_ratio, bool aligned, int64_t canonical_scale,
                                          int64_t canonical_level) {
  STD_TORCH_CHECK(heights.size() == widths.size(), "heights, widths: expected as many of both");
  return run_backward(grad, boxes, spatial_scales,
                      {pooled_height, pooled_width, sampling_ratio, aligned, canonical_scale, canonical_level},
                      {batch_size, channels, heights, widths});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("roi_align_backward", TORCH_BOX(&fastcv::cuda::roi_align_backward_cuda));
  m.impl("multiscale_roi_align_backward", TORCH_BOX(&fastcv::cuda::multiscale_roi_align_backward_cuda));
}
