// What the shells of weighted_boxes_fusion check, for every device.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "../common/stable.h"
#include "weighted_boxes_fusion.h"

namespace fastcv {

inline Confidence confidence_of(const std::string& name) {
  if (name == "avg") return Confidence::avg;
  if (name == "max") return Confidence::max;
  if (name == "box_and_model_avg") return Confidence::box_and_model_avg;
  STD_TORCH_CHECK(name == "absent_model_aware_avg",
                  "conf_type: expected \"avg\", \"max\", \"box_and_model_avg\" or \"absent_model_aware_avg\", got \"",
                  name, "\"");
  return Confidence::absent_model_aware_avg;
}

inline Ensemble check_weighted_boxes_fusion(const Tensor& boxes, const Tensor& scores, const Tensor& labels,
                                            const std::vector<int64_t>& counts, const std::vector<double>& weights,
                                            const std::string& conf_type, bool allows_overflow) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes: expected shape [N, 4]");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 boxes, got ", n);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores: expected shape [", n, "]");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == n, "labels: expected shape [", n, "]");
  STD_TORCH_CHECK(!counts.empty() && counts.size() == weights.size(), "weights: expected ", counts.size(), " weights");
  for (int64_t count : counts)
    STD_TORCH_CHECK(count >= 0 && count <= n, "counts: expected 0 to ", n, ", got ", count);
  STD_TORCH_CHECK(std::accumulate(counts.begin(), counts.end(), int64_t(0)) == n, "counts: expected a sum of ", n);
  return {int64_t(weights.size()), std::accumulate(weights.begin(), weights.end(), 0.0),
          *std::max_element(weights.begin(), weights.end()), confidence_of(conf_type), allows_overflow};
}

// Rounded as `scores >= threshold` in PyTorch rounds it.
inline double rounded_as(const Tensor& scores, double threshold) {
  return scores.scalar_type() == ScalarType::Double ? threshold : float(threshold);
}

}  // namespace fastcv
