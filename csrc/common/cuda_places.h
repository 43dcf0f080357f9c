// The places of a block's threads among those that have something: what they keep lies side by side, in their order.
#pragma once

#include "cuda_launch.h"

namespace fastcv::cuda {

struct Place {
  int before, all;  // how many threads before this one, and of all, have something
};

// For blocks of so many whole warps, all of whose threads come. `counts` is shared memory for a number of each warp; a
// barrier must follow before it is used again.
inline __device__ Place place_in_block(bool has, int* counts, int warps) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const uint32_t word = __ballot_sync(kAllLanes, has);
  if (lane == 0) counts[warp] = __popc(word);
  __syncthreads();
  Place place{__popc(word & ((1u << lane) - 1)), 0};
  for (int w = 0; w < warps; ++w) place.before += w < warp ? counts[w] : 0, place.all += counts[w];
  return place;
}

}  // namespace fastcv::cuda
