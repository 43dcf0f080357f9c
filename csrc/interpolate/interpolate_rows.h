// What the two directions of resampling share.
#pragma once

#include "interpolate.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
FASTCV_INLINE Vec<accumulate_t<S>> load_some(const S* p, int64_t n) {
  return n >= kLanes<accumulate_t<S>> ? load(p) : load_first(p, int(n));
}
template <class S>
FASTCV_INLINE void store_some(S* p, Vec<accumulate_t<S>> x, int64_t n) {
  if (n >= kLanes<accumulate_t<S>>)
    store(p, x);
  else
    store_first(p, x, int(n));
}

// A row, and room for two vectors after it.
template <class T>
int64_t line_size(const FeatureMap<T>& map) {
  return map.width + 2 * kLanes<float>;
}

// The offset of a plane: an image, or a channel of one.
template <class T>
T* plane_of(const FeatureMap<T>& map, bool channels_last, int64_t plane) {
  return channels_last ? map.data + plane * map.stride_n
                       : map.data + plane / map.channels * map.stride_n + plane % map.channels * map.stride_c;
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
