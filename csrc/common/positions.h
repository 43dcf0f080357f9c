// Maxima and their positions in registers, shared by pooling, RoI pooling and programs.
#pragma once

#include "simd.h"

namespace fastcv::FASTCV_ISA {

template <class T>
using Acc = accumulate_t<T>;

template <class T>
using Position = SameSize<Acc<T>>;

// Where a value takes the place of the greatest so far: it is greater, or NaN.
template <class V>
FASTCV_INLINE auto takes_over(V value, V greatest) {
  return (value > greatest) | (value != value);
}

}  // namespace fastcv::FASTCV_ISA
