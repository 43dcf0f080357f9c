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

// Pixels as one row (height 1) where they lie at one stride, as in contiguous and channels-last maps.
template <class T>
FeatureMap<T> flattened(FeatureMap<T> map) {
  if (map.width == 1) map.stride_x = map.stride_y, map.width = map.height, map.height = 1;
  if (map.height > 1 && map.stride_y == map.width * map.stride_x) map.width *= map.height, map.height = 1;
  return map;
}

}  // namespace fastcv
