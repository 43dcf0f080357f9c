// Angles in degrees, for host and device.
#pragma once

#include <cmath>

#include "types.h"

namespace fastcv {

template <class C>
FASTCV_HOST_DEVICE inline void sin_cos_of_degrees(C degrees, C* sin, C* cos) {
#if defined(__CUDA_ARCH__)  // of angles in radians the reduction needs a stack
  sincospi(degrees / 180, sin, cos);
#else
  const C turn = degrees * (C(3.14159265358979323846) / 180);
  *cos = std::cos(turn), *sin = std::sin(turn);
#endif
}

}  // namespace fastcv
