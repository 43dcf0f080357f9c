// Soft non-maximum suppression of one class: each box chosen lowers the scores of those that overlap it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"

namespace fastcv {

// The factor on the score of a box with IoU o to the box just chosen:
enum class SoftNmsMethod {
  naive,     // 0 where o > iou_threshold, else 1
  linear,    // 1 - o where o > iou_threshold, else 1
  gaussian,  // exp(-o^2 / sigma)
};

constexpr int64_t kSoftNmsBlock = 128;

template <class T>
struct SoftNmsSegment {
  const T* boxes;       // [N, 4] as x1, y1, x2, y2
  const T* scores;      // [N]
  const int32_t* rows;  // [n] of boxes and scores: ascending within each kSoftNmsBlock, so that ties go to the lowest;
                        // fast where a block holds neighbours
  int64_t n;
  SoftNmsMethod method;
  double iou_threshold, sigma;
  T score_threshold;    // at least 0; a box takes part while its score is greater
  int32_t* kept_rows;   // [n] written: rows in the order chosen
  T* kept_scores;       // [n] written: their scores when chosen
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Bytes of scratch, aligned to 64, that soft_nms_segment needs for n boxes.
    template <class T> size_t soft_nms_scratch_bytes(int64_t n);
    // Returns the number of boxes chosen.
    template <class T> int64_t soft_nms_segment(const SoftNmsSegment<T>& segment, void* scratch);)
