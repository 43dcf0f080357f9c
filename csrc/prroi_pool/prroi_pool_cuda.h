// What the CUDA kernels of prroi_pool share, forward and backward: regions, whose axes make the taps. Those of RoIAlign
// (roi_forward_cuda.h, roi_backward_cuda.h) do the rest; they are included after this, as they look for tile_weights.
#pragma once

#include "../roi_align/roi_tiles_cuda.h"
#include "prroi_pool.h"

namespace fastcv::cuda {

template <class C>
struct PreciseRegions : RoiRegions<C> {
  using Axis = PreciseAxis<C>;
  static constexpr int kForwardBlocks = sizeof(C) == 8 ? 1 : 2;
  PreciseParts parts;

  __device__ Axis rows(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[2], box[4], C(map.scale), this->pooled_height, parts.rows};
  }
  __device__ Axis columns(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[1], box[3], C(map.scale), this->pooled_width, parts.columns};
  }
};

template <class C, class A>
__device__ bool tile_weights(const PreciseAxis<C>& axis, int64_t p, int64_t size, int64_t origin, A* weights) {
  int64_t first, last;
  axis.sample_range(p, size, &first, &last);
  for (int i = 0; i < kTile; ++i)
    weights[i] = origin + i >= first && origin + i < last ? A(axis.weight(p, origin + i)) : 0;
  return first < origin + kTile && last > origin && first < last;
}

// f(T{}, regions) with the type of the features and the regions on a map of features or gradients.
template <class F>
void dispatch_precise_regions(const Tensor& map, const Tensor& boxes_any, double scale, int64_t pooled_height,
                              int64_t pooled_width, int64_t part, const F& f) {
  const RoiConstants c{pooled_height, pooled_width, 0, false};
  check_regions(boxes_any, {scale}, 1, c);
  STD_TORCH_CHECK(map.size(2) < INT32_MAX && map.size(3) < INT32_MAX,
                  "input: expected fewer than 2^31 rows and columns");
  STD_TORCH_CHECK(part >= 0 && part <= PreciseParts::kMost, "part: expected 0 to ", PreciseParts::kMost, ", got ",
                  part);
  dispatch_regions(map.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    f(feature, PreciseRegions<C>{make_regions<C>({map}, boxes, {scale}, c), PreciseParts(part)});
  });
}

}  // namespace fastcv::cuda
