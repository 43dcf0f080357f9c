// Clustering of weighted boxes fusion. Bytes: 80 per cluster. Operations: boxes times clusters / lanes vector steps of
// about 15 instructions. A cluster's mean box moves as boxes join, so sums are kept and the mean is formed anew.
//
// All in double: the sums of many boxes in float would move means by more than the IoU of a box can bear near the
// threshold.
#include "weighted_boxes_fusion.h"

#include "../common/simd.h"
#include "../nms/box_blocks.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int kSums = 5;  // of score * coordinate (4) and of score

class Clusters {
 public:
  Clusters(int64_t n, void* scratch) : slots_(BoxBlocks<double>::count_slots(n)) {
    mean_ = static_cast<double*>(scratch);
    area_ = mean_ + 4 * slots_;
    sums_ = area_ + slots_;
    for (int64_t i = 0; i < slots_; ++i) area_[i] = __builtin_nan("");  // no cluster: comparisons are false
    for (int64_t i = 0; i < 4 * slots_; ++i) mean_[i] = 0;
  }

  static size_t bytes(int64_t n) { return BoxBlocks<double>::count_slots(n) * (5 + kSums) * sizeof(double); }

  int64_t count() const { return count_; }
  double mean(int64_t cluster, int k) const { return mean_[k * slots_ + cluster]; }

  // The cluster with which the box has the greatest IoU, the first among equals; -1 where none exceeds the threshold.
  int64_t best_match(const double* box, double iou_threshold) const {
    using V = Vec<double>;
    using Ints = Vec<SameSize<double>>;
    const V zero{}, area = broadcast((box[2] - box[0]) * (box[3] - box[1]));
    V best = broadcast(iou_threshold);
    Ints best_cluster = Ints{} - 1, lane = lane_numbers<double>();
    for (int64_t i = 0; i < count_; i += kLanes<double>) {
      const V width = min(load(mean_ + 2 * slots_ + i), broadcast(box[2])) - max(load(mean_ + i), broadcast(box[0]));
      const V height =
          min(load(mean_ + 3 * slots_ + i), broadcast(box[3])) - max(load(mean_ + slots_ + i), broadcast(box[1]));
      const V intersection = max(width, zero) * max(height, zero);
      const V iou = intersection / (load(area_ + i) + area - intersection);
      const Ints better = iou > best;
      best = better ? iou : best;
      best_cluster = better ? lane : best_cluster;
      lane += kLanes<double>;
    }
    int first = 0;
    for (int k = 1; k < kLanes<double>; ++k) {
      const bool found = best_cluster[k] >= 0;
      if (found && (best_cluster[first] < 0 || best[k] > best[first] ||
                    (best[k] == best[first] && best_cluster[k] < best_cluster[first])))
        first = k;
    }
    return best_cluster[first];
  }

  int64_t open(const double* box, double score) {
    double* sums = sums_ + count_ * kSums;
    for (int k = 0; k < 4; ++k) mean_[k * slots_ + count_] = box[k], sums[k] = score * box[k];
    sums[4] = score;
    area_[count_] = (box[2] - box[0]) * (box[3] - box[1]);
    return count_++;
  }

  void join(int64_t cluster, const double* box, double score) {
    double* sums = sums_ + cluster * kSums;
    for (int k = 0; k < 4; ++k) sums[k] += score * box[k];
    sums[4] += score;
    if (!(sums[4] > 0)) return;  // scores of 0 only: the first box stands for all
    for (int k = 0; k < 4; ++k) mean_[k * slots_ + cluster] = sums[k] / sums[4];
    area_[cluster] = (mean(cluster, 2) - mean(cluster, 0)) * (mean(cluster, 3) - mean(cluster, 1));
  }

 private:
  const int64_t slots_;
  int64_t count_ = 0;
  double *mean_, *area_;  // [4, slots], [slots]
  double* sums_;          // [slots, kSums]
};

}  // namespace

size_t fuse_scratch_bytes(int64_t n) { return Clusters::bytes(n); }

int64_t fuse_segment(const FusionSegment& s, void* scratch) {
  Clusters clusters(s.n, scratch);
  for (int64_t i = 0; i < s.n; ++i) {
    const double *box = s.boxes + 4 * int64_t(s.rows[i]), score = s.scores[s.rows[i]];
    const int64_t match = clusters.best_match(box, s.iou_threshold);
    s.cluster[i] = int32_t(match >= 0 ? match : clusters.open(box, score));
    if (match >= 0) clusters.join(match, box, score);
  }
  for (int64_t c = 0; c < clusters.count(); ++c)
    for (int k = 0; k < 4; ++k) s.fused[4 * c + k] = clusters.mean(c, k);
  return clusters.count();
}

}  // namespace fastcv::FASTCV_ISA
