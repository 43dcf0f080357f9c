// What the CUDA kernels of roi_align_rotated share, forward and backward.
#pragma once

#include "../roi_align/roi_tiles_cuda.h"
#include "roi_align_rotated.h"
#include "roi_align_rotated_tensors.h"

namespace fastcv::cuda {

// The pixels that a region may touch along one axis, in the form that roi_tiles_cuda.h asks for.
template <class C>
struct RotatedReach {
  C centre, half;
  bool exists;

  __device__ void extent(int64_t, int64_t size, int32_t* first, int32_t* last) const {
    const C low = centre - half - 2, high = centre + half + 2, edge = C(size - 1);
    *first = 0, *last = -1;
    if (!(exists && low <= edge && high >= 0)) return;
    *first = int32_t(low > 0 ? low : 0), *last = int32_t(high < edge ? high : edge);
  }
};

// boxes: [K, 6].
template <class C>
struct RotatedRegions : RoiRegions<C> {
  bool aligned, clockwise;

  __device__ int level_of(int64_t) const { return 0; }
  __device__ int64_t image_of(int64_t roi) const {
    const C index = this->boxes[6 * roi];
    return index >= 0 && index < C(this->images) ? int64_t(index) : -1;
  }
  __device__ RotatedRegion<C> region(int64_t roi) const {
    return {this->boxes + 6 * roi + 1, C(this->level[0].scale), aligned, clockwise, this->pooled_height,
            this->pooled_width,        this->sampling_ratio};
  }
  __device__ RotatedReach<C> rows(int64_t roi, const RoiMapLevel&) const {
    const RotatedRegion<C> r = region(roi);
    return {r.cy, std::abs(r.top * r.cos) + std::abs(r.left * r.sin), r.grid_h > 0};
  }
  __device__ RotatedReach<C> columns(int64_t roi, const RoiMapLevel&) const {
    const RotatedRegion<C> r = region(roi);
    return {r.cx, std::abs(r.top * r.sin) + std::abs(r.left * r.cos), r.grid_h > 0};
  }
};

// f(T{}, regions) with the type of the features and the regions on a map of features or gradients.
template <class F>
void dispatch_rotated_regions(const Tensor& map, const Tensor& boxes_any, const RotatedConstants& c, const F& f) {
  check_rotated_regions(boxes_any, c, map.size(2), map.size(3));
  dispatch_regions(map.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    const RoiConstants constants{c.pooled_height, c.pooled_width, c.sampling_ratio, c.aligned};
    f(feature, RotatedRegions<C>{make_regions<C>({map}, boxes, {c.scale}, constants), c.aligned, c.clockwise});
  });
}

}  // namespace fastcv::cuda
