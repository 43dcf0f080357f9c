// Maxima and their positions in registers, shared by pooling, RoI pooling and programs.
#pragma once

#include "simd.h"

namespace fastcv::FASTCV_ISA {

template <class T>
using Acc = accumulate_t<T>;

// Positions have as many bits as values, so that one comparison's mask selects both.
template <class A>
struct PositionOf {
  using type = int32_t;
};
template <>
struct PositionOf<double> {
  using type = int64_t;
};
template <class T>
using Position = typename PositionOf<Acc<T>>::type;

// Where a value takes the place of the greatest so far: it is greater, or NaN.
template <class V>
FASTCV_INLINE auto takes_over(V value, V greatest) {
  return (value > greatest) | (value != value);
}

}  // namespace fastcv::FASTCV_ISA
