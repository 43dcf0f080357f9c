// The greatest of the numbers that the threads of a block have, and its place; among equal ones the least place. The
// numbers are at least 0, so that their bits are in order too, and one instruction finds the greatest word of a warp.
#pragma once

#include "cuda_launch.h"

namespace fastcv::cuda {

constexpr unsigned kNowhere = 0xffffffff;

template <class T>
struct Best {
  T value = 0;
  unsigned place = kNowhere;

  // Of places in ascending order.
  __device__ void take(T other, unsigned other_place) {
    if (place == kNowhere || other > value) value = other, place = other_place;
  }
};

inline __device__ Best<float> best_of_warp(Best<float> mine) {
  uint32_t bits;
  memcpy(&bits, &mine.value, 4);
  const uint32_t most = __reduce_max_sync(kAllLanes, bits);
  mine.place = __reduce_min_sync(kAllLanes, bits == most ? mine.place : kNowhere);
  memcpy(&mine.value, &most, 4);
  return mine;
}

inline __device__ Best<double> best_of_warp(Best<double> mine) {
  uint32_t words[2], most[2];  // low, high
  memcpy(words, &mine.value, 8);
  most[1] = __reduce_max_sync(kAllLanes, words[1]);
  most[0] = __reduce_max_sync(kAllLanes, words[1] == most[1] ? words[0] : 0);
  const bool equal = words[0] == most[0] && words[1] == most[1];
  mine.place = __reduce_min_sync(kAllLanes, equal ? mine.place : kNowhere);
  memcpy(&mine.value, most, 8);
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
