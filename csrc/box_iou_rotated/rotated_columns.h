// Rotated boxes coordinate by coordinate, as the CPU's kernels read them.
#pragma once

#include <cstddef>

#include "../common/cpu_isa.h"
#include "box_iou_rotated.h"

namespace fastcv {

// Room for n boxes and what rounds them up to whole vectors, in `memory`.
struct RotatedColumns {
  static constexpr int64_t kWidest = 8;  // doubles in the widest vector
  static constexpr int kColumns = 6;
  static int64_t slots(int64_t n) { return (n + kWidest - 1) / kWidest * kWidest; }
  static int64_t elements(int64_t n) { return kColumns * slots(n); }

  double* column[kColumns];

  __attribute__((always_inline)) RotatedColumns(double* memory, int64_t n) {
    for (int c = 0; c < kColumns; ++c) column[c] = memory + c * slots(n);
  }
  __attribute__((always_inline)) void set(int64_t i, const RotatedBox<double>& b) const {
    const double values[kColumns] = {b.cx, b.cy, b.half_w, b.half_h, b.cos, b.sin};
    for (int c = 0; c < kColumns; ++c) column[c][i] = values[c];
  }
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // out[i - begin][j] of boxes begin <= i < end of a with all m of b, of which columns are zero beyond.
    template <class T> void box_iou_rotated_rows(const RotatedColumns& a, const RotatedColumns& b, int64_t m,
                                                 int64_t begin, int64_t end, T* out);
    // Greedy suppression among n boxes, best first; memory: RotatedColumns::elements(n) of zero. Writes keep[i].
    void nms_rotated_segment(const RotatedColumns& boxes, const int32_t* order, int64_t n, double iou_threshold,
                             double* memory, uint8_t* keep);)
