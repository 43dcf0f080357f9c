// Exact greedy Soft-NMS. Bytes: 24 per box (float). Operations: N vector steps of about 20 instructions for each box
// chosen where all overlap; where they are spread out, only the blocks in reach of the chosen box are visited.
//
// Each block remembers its best score, so choosing costs a look at every block, and a visit updates scores and finds
// the new best in one pass. A block of which half has died is compacted. Within a block rows ascend, hence the first of
// equal scores has the lowest row.
#include "soft_nms.h"

#include "../common/simd.h"
#include "../common/simd_exp.h"
#include "../nms/box_blocks.h"

namespace fastcv::FASTCV_ISA {
namespace {

static_assert(kSoftNmsBlock == kBlock);
constexpr int kDead = -1;  // the score of a box that takes no part any more

template <class T, SoftNmsMethod method>
class SoftNms {
 public:
  SoftNms(const SoftNmsSegment<T>& s, void* scratch)
      : boxes_(s.n, scratch),
        iou_threshold_(round_down(s.iou_threshold, T{})),
        minus_inverse_sigma_(s.sigma > 1e-30 ? T(-1 / s.sigma) : T(-1e30)),
        score_threshold_(s.score_threshold),
        // Boxes that do not overlap have IoU 0, above a negative threshold.
        everywhere_(method == SoftNmsMethod::naive && s.iou_threshold < 0) {
    score_ = reinterpret_cast<T*>(static_cast<char*>(scratch) + BoxBlocks<T>::bytes(s.n));
    best_ = score_ + boxes_.slots;
    row_ = reinterpret_cast<int32_t*>(best_ + boxes_.blocks);
    best_slot_ = row_ + boxes_.slots;
    length_ = best_slot_ + boxes_.blocks;
    boxes_.fill(s.boxes, s.rows);
    for (int64_t i = 0; i < boxes_.slots; ++i) {
      const T score = i < s.n ? s.scores[s.rows[i]] : T(kDead);
      score_[i] = score > score_threshold_ ? score : T(kDead);
      row_[i] = i < s.n ? s.rows[i] : 0;
    }
    for (int64_t b = 0; b < boxes_.blocks; ++b) {
      length_[b] = int32_t(boxes_.end(b) - b * kBlock);
      visit(b, {0, 0, 0, 0, T(__builtin_nan(""))});  // overlaps nothing: finds the best score
    }
  }

  static size_t bytes(int64_t n) {
    const size_t slots = BoxBlocks<T>::count_slots(n), blocks = BoxBlocks<T>::count_blocks(n);
    return BoxBlocks<T>::bytes(n) + (slots + blocks) * sizeof(T) + (slots + 2 * blocks) * sizeof(int32_t);
  }

  int64_t run(int32_t* kept_rows, T* kept_scores) {
    for (int64_t count = 0;; ++count) {
      const int64_t home = best_block();
      if (home < 0) return count;
      const int64_t slot = best_slot_[home];
      kept_rows[count] = row_[slot];
      kept_scores[count] = score_[slot];
      score_[slot] = T(kDead);
      const Box<T> chosen{boxes_.x1[slot], boxes_.y1[slot], boxes_.x2[slot], boxes_.y2[slot], boxes_.area[slot]};
      for (int64_t b = 0; b < boxes_.blocks; ++b)
        if (best_[b] > 0 && (b == home || everywhere_ || chosen.touches(boxes_, b))) visit(b, chosen);
    }
  }

 private:
  // -1 where no box is left; among equal scores the lowest row.
  int64_t best_block() const {
    int64_t best = -1;
    for (int64_t b = 0; b < boxes_.blocks; ++b) {
      if (!(best_[b] > 0)) continue;
      if (best < 0 || best_[b] > best_[best] ||
          (best_[b] == best_[best] && row_[best_slot_[b]] < row_[best_slot_[best]]))
        best = b;
    }
    return best;
  }

  Vec<T> factor(Vec<T> iou) const {
    const Vec<T> one = broadcast(T(1)), threshold = broadcast(iou_threshold_);
    if (method == SoftNmsMethod::naive) return iou > threshold ? Vec<T>{} : one;
    if (method == SoftNmsMethod::linear) return iou > threshold ? one - iou : one;
    return iou > Vec<T>{} ? exp(iou * iou * minus_inverse_sigma_, T{}) : one;
  }

  // Lowers the scores of a block and finds its best one.
  void visit(int64_t block, const Box<T>& chosen) {
    using Ints = Vec<SameSize<T>>;
    const int64_t start = block * kBlock;
    Vec<T> best = broadcast(T(kDead));
    Ints best_lane{}, lane = lane_numbers<T>(), alive{};
    for (int64_t i = start; i < start + length_[block]; i += kLanes<T>) {
      Vec<T> score = load(score_ + i);
      const Vec<T> intersection = chosen.intersection(boxes_, i);
      if (everywhere_ || any(intersection > Vec<T>{})) {
        const Vec<T> lowered =
            score * factor(intersection / (load(boxes_.area + i) + chosen.area - intersection));
        score = lowered > score_threshold_ ? lowered : broadcast(T(kDead));
        store(score_ + i, score);
      }
      alive -= score > Vec<T>{};
      const Ints better = score > best;
      best = better ? score : best;
      best_lane = better ? lane : best_lane;
      lane += kLanes<T>;
    }
    int alive_count = 0, first = 0;
    for (int k = 0; k < kLanes<T>; ++k) {
      alive_count += int(alive[k]);
      if (best[k] > best[first] || (best[k] == best[first] && best_lane[k] < best_lane[first])) first = k;
    }
    best_[block] = best[first];
    best_slot_[block] = int32_t(start + best_lane[first]);
    if (alive_count && 2 * alive_count <= length_[block]) compact(block);
  }

  void compact(int64_t block) {
    const int64_t start = block * kBlock;
    int64_t to = start, best_slot = start;
    for (int64_t i = start; i < start + length_[block]; ++i) {
      if (!(score_[i] > 0)) continue;
      if (i == best_slot_[block]) best_slot = to;
      boxes_.x1[to] = boxes_.x1[i], boxes_.y1[to] = boxes_.y1[i], boxes_.x2[to] = boxes_.x2[i];
      boxes_.y2[to] = boxes_.y2[i], boxes_.area[to] = boxes_.area[i];
      score_[to] = score_[i], row_[to] = row_[i];
      ++to;
    }
    for (int64_t i = to; i < start + length_[block]; ++i) score_[i] = T(kDead);
    length_[block] = int32_t(to - start);
    best_slot_[block] = int32_t(best_slot);
  }

  BoxBlocks<T> boxes_;
  const T iou_threshold_, minus_inverse_sigma_, score_threshold_;
  const bool everywhere_;
  T *score_, *best_;                           // [slots], [blocks]
  int32_t *row_, *best_slot_, *length_;        // [slots], [blocks], [blocks] boxes before compaction's gap
};

}  // namespace

template <class T>
size_t soft_nms_scratch_bytes(int64_t n) {
  return SoftNms<T, SoftNmsMethod::naive>::bytes(n);
}

template <class T>
int64_t soft_nms_segment(const SoftNmsSegment<T>& s, void* scratch) {
  switch (s.method) {
    case SoftNmsMethod::naive: return SoftNms<T, SoftNmsMethod::naive>(s, scratch).run(s.kept_rows, s.kept_scores);
    case SoftNmsMethod::linear: return SoftNms<T, SoftNmsMethod::linear>(s, scratch).run(s.kept_rows, s.kept_scores);
    default: return SoftNms<T, SoftNmsMethod::gaussian>(s, scratch).run(s.kept_rows, s.kept_scores);
  }
}

template size_t soft_nms_scratch_bytes<float>(int64_t);
template size_t soft_nms_scratch_bytes<double>(int64_t);
template int64_t soft_nms_segment<float>(const SoftNmsSegment<float>&, void*);
template int64_t soft_nms_segment<double>(const SoftNmsSegment<double>&, void*);

}  // namespace fastcv::FASTCV_ISA
