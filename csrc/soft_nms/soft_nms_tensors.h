// What the shells of soft_nms check, for every device.
#pragma once

#include <limits>
#include <optional>
#include <string>

#include "../common/stable.h"
#include "soft_nms.h"

namespace fastcv {

struct SoftNmsSettings {
  SoftNmsMethod method;
  double iou_threshold, sigma, score_threshold;
};

inline SoftNmsMethod soft_nms_method(const std::string& name) {
  if (name == "naive") return SoftNmsMethod::naive;
  if (name == "linear") return SoftNmsMethod::linear;
  STD_TORCH_CHECK(name == "gaussian", "method: expected \"naive\", \"linear\" or \"gaussian\", got \"", name, "\"");
  return SoftNmsMethod::gaussian;
}

inline void check_soft_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                           const SoftNmsSettings& settings) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes: expected shape [N, 4]");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 boxes, got ", n);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores: expected shape [", n, "]");
  STD_TORCH_CHECK(!idxs || (idxs->dim() == 1 && idxs->size(0) == n), "idxs: expected shape [", n, "]");
  STD_TORCH_CHECK(settings.score_threshold >= 0, "score_threshold: expected at least 0, got ",
                  settings.score_threshold);
  STD_TORCH_CHECK(settings.sigma > 0, "sigma: expected greater than 0, got ", settings.sigma);
}

}  // namespace fastcv
