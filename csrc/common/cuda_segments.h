// Positions sorted by class in CUDA kernels: a segment is the positions of one class.
#pragma once

#include "cuda_launch.h"

namespace fastcv::cuda {

// ids: [n] by index; order: [n] indices, ids ascending.

// The first position with the id of position p.
inline __device__ int64_t segment_begin(const int64_t* ids, const int64_t* order, int64_t p) {
  const int64_t id = ids[order[p]];
  int64_t first = 0;
  for (int64_t last = p; first < last;) {
    const int64_t middle = (first + last) / 2;
    ids[order[middle]] < id ? first = middle + 1 : last = middle;
  }
  return first;
}

// The position after the last one with the id of position p.
inline __device__ int64_t segment_end(const int64_t* ids, const int64_t* order, int64_t p, int64_t n) {
  const int64_t id = ids[order[p]];
  int64_t first = p + 1;
  for (int64_t last = n; first < last;) {
    const int64_t middle = (first + last) / 2;
    ids[order[middle]] > id ? last = middle : first = middle + 1;
  }
  return first;
}

struct Segment {
  int32_t begin, end;
};

// In no certain order: for kernels whose blocks take a segment each, and write where it lies.
struct SegmentList {
  Segment* segments;  // [n] at most
  int32_t* count;
};

// Without ids all positions are one segment. A template, so that it is compiled where it is launched.
template <class Id>
__global__ void list_segments_kernel(const Id* ids, const int64_t* order, int64_t n, SegmentList list) {
  const int64_t p = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (p >= n || (p > 0 && (!ids || ids[order[p]] == ids[order[p - 1]]))) return;
  const int64_t end = ids ? segment_end(ids, order, p, n) : n;
  list.segments[atomicAdd(list.count, 1)] = {int32_t(p), int32_t(end)};
}

// order, sorted again by ids, within the last dimension.
inline Tensor grouped(const Tensor& order, const Tensor& ids) {
  return gather(order, stable_argsort(gather(ids, order), false));
}

}  // namespace fastcv::cuda
