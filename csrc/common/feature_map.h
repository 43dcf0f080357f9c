// A feature map as kernels see it.
#pragma once

#include <cstdint>

namespace fastcv {

// [N, C, H, W] with strides in elements.
template <class T>
struct FeatureMap {
  T* data;
  int64_t images, channels, height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;
};

}  // namespace fastcv
