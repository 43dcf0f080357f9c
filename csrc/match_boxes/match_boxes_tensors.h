// From tensors to a task of match_boxes, with what memory safety asks for.
#pragma once

#include "../common/stable.h"
#include "match_boxes.h"

namespace fastcv {

inline void check_match_boxes(const Tensor& truth, const Tensor& boxes) {
  STD_TORCH_CHECK(truth.dim() == 2 && truth.size(1) == 4, "gt_boxes: expected shape [M, 4]");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes: expected shape [N, 4]");
  STD_TORCH_CHECK(truth.size(0) < 0x7fffffff, "gt_boxes: expected less than 2^31 boxes, got ", truth.size(0));
  const ScalarType type = boxes.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "boxes: expected float32 or float64");
  STD_TORCH_CHECK(truth.scalar_type() == type, "gt_boxes: expected the dtype of boxes");
}

// f(MatchBoxes<A>), of contiguous tensors.
template <class F>
void with_match_boxes(const Tensor& truth, const Tensor& boxes, double high, double low, const Tensor& matches,
                      const F& f) {
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    f(MatchBoxes<A>{data<A>(truth), data<A>(boxes), truth.size(0), boxes.size(0), A(high), A(low), nullptr,
                    mutable_data<int64_t>(matches)});
  };
  boxes.scalar_type() == ScalarType::Double ? run(double(0)) : run(float(0));
}

}  // namespace fastcv
