// The storage types of kernels.
#pragma once

#include <cstdint>

// Of functions that CUDA kernels call too.
#if defined(__CUDACC__)
#define FASTCV_HOST_DEVICE __host__ __device__
#else
#define FASTCV_HOST_DEVICE
#endif

namespace fastcv {

// IEEE binary16 and bfloat16 as they lie in memory; arithmetic is always done in float.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

// The type in which a kernel accumulates: double for double, float for all others.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

}  // namespace fastcv
