// The greatest of the numbers that the threads of a block have, and its place; among equal ones the least place. The
// numbers are at least 0, so that their bits are in order too, and one instruction finds the greatest word of a warp.
#pragma once

#include "cuda_launch.h"

namespace fastcv::cuda {

constexpr unsigned kNowhere = 0xffffffff;

// Numbers of at least 0 as integers in the same order.
template <class T>
using Bits = std::conditional_t<std::is_same_v<T, double>, unsigned long long, unsigned>;

template <class T>
__device__ Bits<T> to_bits(T x) {
  Bits<T> bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
__device__ T from_bits(Bits<T> bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline __device__ unsigned greatest_of_warp(unsigned bits) { return __reduce_max_sync(kAllLanes, bits); }
inline __device__ unsigned long long greatest_of_warp(unsigned long long bits) {
  const unsigned high = __reduce_max_sync(kAllLanes, unsigned(bits >> 32));
  const unsigned low = __reduce_max_sync(kAllLanes, bits >> 32 == high ? unsigned(bits) : 0);
  return (unsigned long long)(high) << 32 | low;
}

template <class T>
struct Best {
  T value = 0;
  unsigned place = kNowhere;

  // Of places in ascending order.
  __device__ void take(T other, unsigned other_place) {
    if (place == kNowhere || other > value) value = other, place = other_place;
  }
};

template <class T>
__device__ Best<T> best_of_warp(Best<T> mine) {
  const Bits<T> bits = to_bits(mine.value), most = greatest_of_warp(bits);
  mine.place = __reduce_min_sync(kAllLanes, bits == most ? mine.place : kNowhere);
  mine.value = from_bits<T>(most);
  return mine;
}

// For blocks of whole warps. `warps` is shared memory for a number of each, which must not be that of the call before:
// so one barrier is enough.
template <class T>
__device__ Best<T> best_of_block(Best<T> mine, Best<T>* warps) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  mine = best_of_warp(mine);
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  return best_of_warp(lane * kWarp < int(blockDim.x) ? warps[lane] : Best<T>{});
}

}  // namespace fastcv::cuda
