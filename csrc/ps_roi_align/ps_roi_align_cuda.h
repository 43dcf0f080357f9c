// What the CUDA kernels of ps_roi_align and ps_roi_pool share, forward and backward: regions, whose axes make the taps.
#pragma once

#include "../roi_align/roi_align_cuda.h"
#include "ps_roi_align.h"

namespace fastcv::cuda {

// Those of ps_roi_pool; ps_roi_align's are those of RoIAlign.
template <class C>
struct MeanRegions : RoiRegions<C> {
  __device__ MeanAxis<C> rows(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[2], box[4], C(map.scale), this->pooled_height};
  }
  __device__ MeanAxis<C> columns(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[1], box[3], C(map.scale), this->pooled_width};
  }
};

// The constants of one call; RoIAlign's coordinates are shifted by half a pixel, and regions never widened.
struct PsConstants : RoiConstants {
  bool mean;
  double scale;

  PsConstants(bool mean, double scale, int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio)
      : RoiConstants{pooled_height, pooled_width, sampling_ratio, true}, mean(mean), scale(scale) {}

  int64_t axis_bins() const { return pooled_height + pooled_width; }
};

inline void check_ps_regions(const Tensor& boxes, const PsConstants& c, int64_t channels) {
  check_regions(boxes, {c.scale}, 1, c);
  // Kernels count channels and bins in 32 bits.
  STD_TORCH_CHECK(channels < INT32_MAX && c.pooled_height < 1 << 15 && c.pooled_width < 1 << 15,
                  "input: expected fewer than 2^31 channels, and 2^15 bins along an axis");
}

// f(T{}, regions) with the type of the features and the regions on a map of features or gradients.
template <class F>
void dispatch_ps_regions(const Tensor& map, const Tensor& boxes_any, const PsConstants& c, const F& f) {
  dispatch_regions(map.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    const RoiRegions<C> regions = make_regions<C>({map}, boxes, {c.scale}, c);
    if (c.mean)
      f(feature, MeanRegions<C>{regions});
    else
      f(feature, regions);
  });
}

}  // namespace fastcv::cuda
