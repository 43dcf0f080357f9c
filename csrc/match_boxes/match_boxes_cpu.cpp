// Tensor shell of match_boxes.
#include <vector>

#include "match_boxes_tensors.h"

namespace fastcv {
namespace {

constexpr int64_t kTaskBoxes = 4096;

// The greatest IoU of each ground truth, over tasks that each found their own.
template <class A>
std::vector<A> find_most(const MatchBoxes<A>& task) {
  const int64_t tasks = (task.count + kTaskBoxes - 1) / kTaskBoxes;
  std::vector<A> most(size_t(tasks * task.truths));
  parallel_dynamic(task.count, kTaskBoxes, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate_scratch<A>(FASTCV_PICK(match_boxes_scratch<A>)());
    FASTCV_PICK(match_boxes_most<A>)(task, begin, end, scratch.get(), most.data() + begin / kTaskBoxes * task.truths);
  });
  for (int64_t t = 1; t < tasks; ++t)
    for (int64_t g = 0; g < task.truths; ++g) most[g] = std::max(most[g], most[t * task.truths + g]);
  return most;
}

Tensor match_boxes_cpu(const Tensor& truth_any, const Tensor& boxes_any, double high, double low,
                       bool allow_low_quality_matches) {
  check_match_boxes(truth_any, boxes_any);
  const Tensor truth = as_contiguous(truth_any, truth_any.scalar_type());
  const Tensor boxes = as_contiguous(boxes_any, boxes_any.scalar_type());
  Tensor matches = empty_cpu({boxes.size(0)}, ScalarType::Long);
  with_match_boxes(truth, boxes, high, low, matches, [&](auto task) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(task.boxes)>>;
    std::vector<A> most;
    if (allow_low_quality_matches && task.truths > 0) most = find_most(task), task.most = most.data();
    parallel_dynamic(task.count, kTaskBoxes, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_scratch<A>(FASTCV_PICK(match_boxes_scratch<A>)());
      FASTCV_PICK(match_boxes<A>)(task, begin, end, scratch.get());
    });
  });
  return matches;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) { m.impl("match_boxes", TORCH_BOX(&fastcv::match_boxes_cpu)); }
