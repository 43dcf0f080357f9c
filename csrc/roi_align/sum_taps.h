// The inner loop of the RoI operators: a weighted sum of pixels, NV vectors of channels at a time, in registers.
#pragma once

#include "../common/simd.h"
#include "roi_align.h"

namespace fastcv::FASTCV_ISA {

template <int NV, class T>
FASTCV_INLINE void sum_taps(const T* features, int64_t stride_y, int64_t stride_x, const Tap<accumulate_t<T>>* y,
                            const Tap<accumulate_t<T>>* y_end, const Tap<accumulate_t<T>>* x,
                            const Tap<accumulate_t<T>>* x_end, Vec<accumulate_t<T>> (&sum)[NV]) {
  using A = accumulate_t<T>;
  Vec<A> odd[NV];  // two sums: one alone would wait for each addition to end
  for (int v = 0; v < NV; ++v) sum[v] = odd[v] = Vec<A>{};
  for (; y < y_end; ++y) {
    const T* row = features + y->index * stride_y;
    const Tap<A>* tap = x;
    for (; tap + 1 < x_end; tap += 2) {
      const Vec<A> weight = broadcast(y->weight * tap[0].weight), next = broadcast(y->weight * tap[1].weight);
      const T *pixel = row + tap[0].index * stride_x, *next_pixel = row + tap[1].index * stride_x;
      for (int v = 0; v < NV; ++v) {
        sum[v] = fma(load(pixel + v * kLanes<A>), weight, sum[v]);
        odd[v] = fma(load(next_pixel + v * kLanes<A>), next, odd[v]);
      }
    }
    if (tap < x_end) {
      const Vec<A> weight = broadcast(y->weight * tap->weight);
      const T* pixel = row + tap->index * stride_x;
      for (int v = 0; v < NV; ++v) sum[v] = fma(load(pixel + v * kLanes<A>), weight, sum[v]);
    }
  }
  for (int v = 0; v < NV; ++v) sum[v] += odd[v];
}

}  // namespace fastcv::FASTCV_ISA
