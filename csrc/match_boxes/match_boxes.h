// Boxes (anchors or proposals) matched to ground truth by IoU (Ren et al., "Faster R-CNN", NIPS 2015, section 3.1.2).
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/types.h"

namespace fastcv {

template <class A>
struct MatchBoxes {
  const A* truth;  // [truths, 4] as x1, y1, x2, y2
  const A* boxes;  // [count, 4]
  int64_t truths, count;
  A high, low;
  const A* most;     // [truths] the greatest IoU of each, whose boxes are matched whatever it is; null: they are not
  int64_t* matches;  // [count] a row of truth, or kBelow or kBetween the thresholds
};
constexpr int64_t kBelow = -1, kBetween = -2;

}  // namespace fastcv

FASTCV_EACH_ISA(
    template <class A> int64_t match_boxes_scratch();  // elements
    // most[truth] = greatest IoU of boxes begin <= i < end.
    template <class A> void match_boxes_most(const MatchBoxes<A>& task, int64_t begin, int64_t end, A* scratch, A* most);
    template <class A> void match_boxes(const MatchBoxes<A>& task, int64_t begin, int64_t end, A* scratch);)
