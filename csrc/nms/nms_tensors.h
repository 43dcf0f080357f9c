// What the shells of nms, batched_nms and nms_padded share, for every device.
#pragma once

#include <limits>
#include <optional>

#include "../common/stable.h"

namespace fastcv {

constexpr double kNoThreshold = -std::numeric_limits<double>::infinity();

struct Criterion {
  double iou_threshold;
  bool diou;
};

struct PaddedOutput {
  int64_t *indices, *labels, *counts;  // [B, limit], [B, limit], [B]
  int64_t limit;
};

inline void check_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes: expected shape [N, 4]");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores: expected shape [", n, "]");
  STD_TORCH_CHECK(!idxs || (idxs->dim() == 1 && idxs->size(0) == n), "idxs: expected shape [", n, "]");
}

inline void check_nms_padded(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                             int64_t max_output) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes: expected shape [B, N, 4]");
  STD_TORCH_CHECK(max_output >= 0, "max_output: expected at least 0, got ", max_output);
  const int64_t images = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK((scores.dim() == 2 || scores.dim() == 3) && scores.size(0) == images && scores.size(-1) == n,
                  "scores: expected shape [B, N] or [B, C, N] with B = ", images, ", N = ", n);
  STD_TORCH_CHECK(
      !idxs || (scores.dim() == 2 && idxs->dim() == 2 && idxs->size(0) == images && idxs->size(1) == n),
      "idxs: expected shape [B, N] = [", images, ", ", n, "], with scores of the same shape");
}

}  // namespace fastcv
