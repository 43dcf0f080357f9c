// Non-maximum suppression of one segment: boxes of one class of one image.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"

namespace fastcv {

template <class T>
struct NmsSegment {
  const T* boxes;        // [N, 4] as x1, y1, x2, y2
  const int32_t* order;  // [n] rows of boxes, best score first
  int64_t n;
  double iou_threshold;  // suppressed: IoU (or DIoU) > iou_threshold
  bool diou;             // IoU minus squared centre distance over squared diagonal of the enclosing box
  uint8_t* keep;         // [n] written: 1 where order[i] is kept
  int64_t max_keep;      // stop after so many; the rest of keep is written 0
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Bytes of scratch, aligned to 64, that nms_segment needs for n boxes.
    template <class T> size_t nms_scratch_bytes(int64_t n);
    // Returns the number of boxes kept.
    template <class T> int64_t nms_segment(const NmsSegment<T>& segment, void* scratch);
    // Writes the rows i < n with scores[i] > threshold (>= where inclusive) to rows, which holds n; returns how many.
    template <class T> int64_t select_scores(const T* scores, int64_t n, T threshold, bool inclusive, int32_t* rows);)
