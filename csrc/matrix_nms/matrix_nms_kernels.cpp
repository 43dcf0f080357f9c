// The two passes of Matrix NMS over blocks of neighbours. Bytes: 32 per box (float), never a matrix. Operations: up to
// N^2 / lanes vector steps of about 15 instructions a pass; blocks out of reach or without better boxes are left out.
//
// Maxima do not depend on the order they are taken in, so results are equal for any split over threads. In the gaussian
// pass the exponential is taken once a box: min exp(-sigma a) = exp(-sigma max a).
#include "matrix_nms.h"

#include "../common/simd.h"
#include "../common/simd_exp.h"
#include "../nms/box_blocks.h"

namespace fastcv::FASTCV_ISA {
namespace {

static_assert(kMatrixNmsBlock == kBlock);

template <class T>
struct RankedBlocks {
  BoxBlocks<T> boxes;
  SameSize<T>* rank;   // [slots]; beyond n the largest
  T* overlap;            // [slots] c_i, then what pass 2 makes of it
  int32_t* best_rank;    // [blocks]

  RankedBlocks(int64_t n, void* scratch) : boxes(n, scratch) {
    rank = reinterpret_cast<SameSize<T>*>(static_cast<char*>(scratch) + BoxBlocks<T>::bytes(n));
    overlap = reinterpret_cast<T*>(rank + boxes.slots);
    best_rank = reinterpret_cast<int32_t*>(overlap + boxes.slots);
  }

  static size_t bytes(int64_t n) {
    const size_t slots = BoxBlocks<T>::count_slots(n), blocks = BoxBlocks<T>::count_blocks(n);
    return (BoxBlocks<T>::bytes(n) + 2 * slots * sizeof(T) + blocks * sizeof(int32_t) + 63) / 64 * 64;
  }

  // The largest value(iou, slot) over better boxes that overlap box j, at least `least`; NaN is passed over.
  template <class Value>
  T largest(int64_t j, T least, const Value& value) const {
    const Box<T> box{boxes.x1[j], boxes.y1[j], boxes.x2[j], boxes.y2[j], boxes.area[j]};
    const SameSize<T> own_rank = rank[j];
    const Vec<T> zero{};
    Vec<T> most = broadcast(least);
    for (int64_t b = 0; b < boxes.blocks; ++b) {
      if (best_rank[b] >= own_rank || !box.touches(boxes, b)) continue;
      for (int64_t i = b * kBlock; i < boxes.end(b); i += kLanes<T>) {
        Vec<SameSize<T>> others_rank;
        memcpy(&others_rank, rank + i, sizeof others_rank);
        const Vec<T> intersection = box.intersection(boxes, i);
        const auto better = (intersection > zero) & (others_rank < own_rank);
        if (!any(better)) continue;
        const Vec<T> iou = intersection / (load(boxes.area + i) + box.area - intersection);
        const Vec<T> found = value(iou, i);
        most = better & (found > most) ? found : most;
      }
    }
    T result = least;
    for (int k = 0; k < kLanes<T>; ++k) result = most[k] > result ? most[k] : result;
    return result;
  }
};

template <class T>
int64_t clipped_end(const MatrixNmsSegment<T>& s, int64_t block) {
  return block * kBlock < s.n ? block * kBlock : s.n;
}

}  // namespace

template <class T>
size_t matrix_nms_scratch_bytes(int64_t n) {
  return RankedBlocks<T>::bytes(n);
}

template <class T>
void matrix_nms_prepare(const MatrixNmsSegment<T>& s, void* scratch) {
  RankedBlocks<T> blocks(s.n, scratch);
  blocks.boxes.fill(s.boxes, s.rows);
  for (int64_t i = 0; i < blocks.boxes.slots; ++i) {
    blocks.rank[i] = i < s.n ? s.ranks[i] : INT32_MAX;
    blocks.overlap[i] = 0;
  }
  for (int64_t b = 0; b < blocks.boxes.blocks; ++b) {
    int32_t best = INT32_MAX;
    for (int64_t i = b * kBlock; i < blocks.boxes.end(b); ++i) best = s.ranks[i] < best ? s.ranks[i] : best;
    blocks.best_rank[b] = best;
  }
}

template <class T>
void matrix_nms_overlap(const MatrixNmsSegment<T>& s, void* scratch, int64_t begin, int64_t end) {
  const RankedBlocks<T> blocks(s.n, scratch);
  for (int64_t j = begin * kBlock; j < clipped_end(s, end); ++j)
    blocks.overlap[j] = blocks.largest(j, T(0), [](Vec<T> iou, int64_t) { return iou; });
}

template <class T>
void matrix_nms_decay(const MatrixNmsSegment<T>& s, void* scratch, int64_t begin, int64_t end) {
  const RankedBlocks<T> blocks(s.n, scratch);
  const Vec<T> one = broadcast(T(1));
  if (s.linear) {
    // A divisor of 0 makes -infinity or NaN: no say.
    const auto minus_ratio = [&](Vec<T> iou, int64_t i) { return (iou - one) / (one - load(blocks.overlap + i)); };
    for (int64_t j = begin * kBlock; j < clipped_end(s, end); ++j) s.decay[j] = -blocks.largest(j, T(-1), minus_ratio);
    return;
  }
  const auto excess = [&](Vec<T> iou, int64_t i) {
    const Vec<T> forgiven = load(blocks.overlap + i);
    return iou * iou - forgiven * forgiven;
  };
  const T minus_sigma = s.sigma < 1e30 ? T(-s.sigma) : T(-1e30);
  for (int64_t j = begin * kBlock; j < clipped_end(s, end); j += kLanes<T>) {
    Vec<T> most{};
    const int count = clipped_end(s, end) - j < kLanes<T> ? int(clipped_end(s, end) - j) : kLanes<T>;
    for (int k = 0; k < count; ++k) most[k] = blocks.largest(j + k, T(0), excess);
    store_first(s.decay + j, exp(most * minus_sigma, T{}), count);
  }
}

#define FASTCV_INSTANTIATE(T)                                                                         \
  template size_t matrix_nms_scratch_bytes<T>(int64_t);                                               \
  template void matrix_nms_prepare<T>(const MatrixNmsSegment<T>&, void*);                             \
  template void matrix_nms_overlap<T>(const MatrixNmsSegment<T>&, void*, int64_t, int64_t);           \
  template void matrix_nms_decay<T>(const MatrixNmsSegment<T>&, void*, int64_t, int64_t);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)

}  // namespace fastcv::FASTCV_ISA
