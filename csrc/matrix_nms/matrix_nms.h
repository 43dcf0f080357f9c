// Matrix NMS of one class: the score of each box decays by the worst of its overlaps with better boxes, each overlap
// forgiven as far as that better box is itself overlapped. All boxes at once, in two passes:
//     c_i = max over better k of IoU(k, i)
//     decay_j = min over better i of f(IoU(i, j)) / f(c_i), at most 1
// with f(o) = exp(-sigma o^2) (gaussian) or 1 - o (linear). A box i with f(c_i) = 0 has no say.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"

namespace fastcv {

constexpr int64_t kMatrixNmsBlock = 128;

template <class T>
struct MatrixNmsSegment {
  const T* boxes;        // [N, 4] as x1, y1, x2, y2
  const int32_t* rows;   // [n] of boxes, in any order; fast where neighbours come together
  const int32_t* ranks;  // [n] place of each by score, different for all; a box is better where its rank is smaller
  int64_t n;
  bool linear;
  double sigma;
  T* decay;              // [n] written: factors in the order of rows
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Bytes of scratch, aligned to 64, for n boxes; a multiple of 64.
    template <class T> size_t matrix_nms_scratch_bytes(int64_t n);
    // The three steps, each after the one before. The passes work on blocks [begin, end) of kMatrixNmsBlock rows, any
    // split of them on any threads.
    template <class T> void matrix_nms_prepare(const MatrixNmsSegment<T>& segment, void* scratch);
    template <class T> void matrix_nms_overlap(const MatrixNmsSegment<T>& segment, void* scratch, int64_t begin,
                                               int64_t end);
    template <class T> void matrix_nms_decay(const MatrixNmsSegment<T>& segment, void* scratch, int64_t begin,
                                             int64_t end);)
