// What the CUDA kernels of roi_pool share, forward and backward: regions, whose axes give the pixels of bins.
#pragma once

#include "../roi_align/roi_align_cuda.h"
#include "roi_pool.h"

namespace fastcv::cuda {

template <class C>
struct PoolRegions : RoiRegions<C> {
  __device__ PoolAxis<C> rows(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[2], box[4], C(map.scale), this->pooled_height};
  }
  __device__ PoolAxis<C> columns(int64_t roi, const RoiMapLevel& map) const {
    const C* box = this->boxes + 5 * roi;
    return {box[1], box[3], C(map.scale), this->pooled_width};
  }
};

// Kernels count the bins of 256 channels in 32 bits, as positions are.
inline void check_pool(const Tensor& boxes, const RoiConstants& c, double scale, int64_t height, int64_t width) {
  check_regions(boxes, {scale}, 1, c);
  STD_TORCH_CHECK(c.pooled_height <= 2048 && c.pooled_width <= 2048, "output_size: expected at most 2048 x 2048, got ",
                  c.pooled_height, " x ", c.pooled_width);
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < INT32_MAX && width < INT32_MAX && height * width < INT32_MAX,
                  "input: expected fewer than 2^31 pixels per channel, got ", height, " x ", width);
}

// f(T{}, regions) with the type of the features and the regions on a map of features or gradients.
template <class F>
void dispatch_pool_regions(const Tensor& map, const Tensor& boxes_any, double scale, const RoiConstants& c,
                           const F& f) {
  dispatch_regions(map.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    f(feature, PoolRegions<C>{make_regions<C>({map}, boxes, {scale}, c)});
  });
}

}  // namespace fastcv::cuda
