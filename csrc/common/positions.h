// Positions of maxima in registers, shared by pooling and RoI pooling.
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

}  // namespace fastcv::FASTCV_ISA
