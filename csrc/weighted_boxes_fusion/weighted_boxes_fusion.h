// Weighted boxes fusion of one class: boxes of several models gathered in clusters, each averaged by score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/types.h"

namespace fastcv {

enum class Confidence { avg, max, box_and_model_avg, absent_model_aware_avg };

struct Ensemble {
  int64_t models;
  double total, largest;  // of their weights
  Confidence confidence;
  bool allows_overflow;
};

// What the boxes of one cluster add up to.
struct Cluster {
  double score_sum = 0, best_score = 0, weight_sum = 0;
  double models_weight = 0;  // of the models that have a box here, each counted once
  int32_t boxes = 0;
  int32_t first_row = -1;

  FASTCV_HOST_DEVICE double score(const Ensemble& e) const {
    const double mean = score_sum / double(boxes);
    switch (e.confidence) {
      case Confidence::max: return best_score / e.largest;
      case Confidence::box_and_model_avg:
        return weight_sum > 0 ? score_sum / weight_sum * models_weight / e.total : 0;
      case Confidence::absent_model_aware_avg: return score_sum / (weight_sum + (e.total - models_weight));
      default: return mean * double(e.allows_overflow || boxes < e.models ? boxes : e.models) / e.total;
    }
  }
};

struct FusionSegment {
  const double* boxes;   // [N, 4] as x1, y1, x2, y2, each with a finite area above 0
  const double* scores;  // [N] weighted by model, at least 0
  const int32_t* rows;   // [n] of boxes and scores, best score first
  int64_t n;
  double iou_threshold;  // a box joins the cluster with which its IoU is greatest and greater than this
  int32_t* cluster;      // [n] written: the cluster of each, numbered by their first boxes
  double* fused;         // [n, 4] written as far as there are clusters: their mean boxes
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Bytes of scratch, aligned to 64, that fuse_segment needs for n boxes.
    size_t fuse_scratch_bytes(int64_t n);
    // Returns the number of clusters.
    int64_t fuse_segment(const FusionSegment& segment, void* scratch);)
