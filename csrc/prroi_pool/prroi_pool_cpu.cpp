// Tensor shells of prroi_pool: RoIAlign's kernels with other taps.
#include "prroi_pool.h"

#include "../roi_align/roi_pooling.h"

namespace fastcv {
namespace {

template <class W>
RoiPlan<W> plan_precise(const Tensor& boxes, const RoiGeometry& g, int64_t part) {
  STD_TORCH_CHECK(part >= 0 && part <= PreciseParts::kMost, "part: expected 0 to ", PreciseParts::kMost, ", got ",
                  part);
  const PreciseParts parts(part);
  return plan_rois<W>(boxes, g, [&]<class C>(C low, C high, C scale, int64_t bins, bool is_vertical) {
    return PreciseAxis<C>(low, high, scale, bins, is_vertical ? parts.rows : parts.columns);
  });
}

Tensor prroi_pool_cpu(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                      int64_t pooled_width, int64_t part) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const RoiGeometry g{{{input.size(2), input.size(3), spatial_scale}}, input.size(0), pooled_height, pooled_width};
  Tensor output = empty_cpu({boxes.size(0), input.size(1), pooled_height, pooled_width}, input.scalar_type(),
                            memory_format(input));
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const auto plan = plan_precise<accumulate_t<T>>(boxes, g, part);
    if (output.numel() > 0) pool_regions<T>({input}, plan, g, output);
  });
  return output;
}

Tensor prroi_pool_backward_cpu(const Tensor& grad_any, const Tensor& boxes, double spatial_scale,
                               int64_t pooled_height, int64_t pooled_width, int64_t batch_size, int64_t channels,
                               int64_t height, int64_t width, int64_t part) {
  check_pooled(grad_any, "grad", boxes, channels, pooled_height, pooled_width);
  const RoiGeometry g{{{height, width, spatial_scale}}, batch_size, pooled_height, pooled_width};
  const Tensor grad = with_one_bin_stride(grad_any);
  Tensor grad_input = empty_cpu({batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    pool_regions_backward<T>(grad, plan_precise<accumulate_t<T>>(boxes, g, part), g, {grad_input});
  });
  return grad_input;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("prroi_pool", TORCH_BOX(&fastcv::prroi_pool_cpu));
  m.impl("prroi_pool_backward", TORCH_BOX(&fastcv::prroi_pool_backward_cpu));
}
