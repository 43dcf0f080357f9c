// What the shells of matrix_nms check, for every device.
#pragma once

#include <limits>
#include <optional>

#include "../common/stable.h"
#include "matrix_nms.h"

namespace fastcv {

inline void check_matrix_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes: expected shape [B, N, 4]");
  const int64_t images = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 boxes, got ", n);
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(0) == images && scores.size(1) == n, "scores: expected shape [",
                  images, ", ", n, "]");
  STD_TORCH_CHECK(!idxs || (idxs->dim() == 2 && idxs->size(0) == images && idxs->size(1) == n),
                  "idxs: expected shape [", images, ", ", n, "]");
}

}  // namespace fastcv
