// Weighted boxes fusion of one class: boxes of several models gathered in clusters, each averaged by score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"

namespace fastcv {

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
