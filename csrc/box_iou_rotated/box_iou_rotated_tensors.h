// What the shells of box_iou_rotated and nms_rotated check, for every device.
#pragma once

#include <limits>
#include <optional>

#include "../common/stable.h"

namespace fastcv {

inline void check_rotated(const Tensor& boxes, const char* name) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, name, ": expected shape [N, 5]");
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Double, name, ": expected float64");
  STD_TORCH_CHECK(boxes.size(0) < std::numeric_limits<int32_t>::max(), name, ": expected fewer than 2^31 boxes, got ",
                  boxes.size(0));
}

inline void check_nms_rotated(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs) {
  check_rotated(boxes, "boxes");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores: expected shape [", n, "]");
  STD_TORCH_CHECK(!idxs || (idxs->dim() == 1 && idxs->size(0) == n), "idxs: expected shape [", n, "]");
}

}  // namespace fastcv
