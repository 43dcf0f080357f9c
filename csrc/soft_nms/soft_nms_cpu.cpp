// Tensor shell of soft_nms: select, order along a curve, split into classes, run the kernel, merge by final score.
#include <cmath>
#include <string>
#include <type_traits>

#include "../common/segments.h"
#include "../common/spatial_order.h"
#include "../nms/nms.h"
#include "soft_nms_tensors.h"

namespace fastcv {
namespace {

// Rows whose score is above the threshold and whose box has no NaN.
template <class T>
std::vector<int32_t> candidate_rows(const T* boxes, const T* scores, int64_t n, T score_threshold) {
  std::vector<int32_t> rows(n);
  const int64_t count = FASTCV_PICK(select_scores<T>)(scores, n, score_threshold, false, rows.data());
  size_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* b = boxes + 4 * int64_t(rows[i]);
    if (!std::isnan(b[0]) && !std::isnan(b[1]) && !std::isnan(b[2]) && !std::isnan(b[3])) rows[kept++] = rows[i];
  }
  rows.resize(kept);
  return rows;
}

// Runs every class; writes the final score of each chosen row and -1 for all others.
template <class T>
void soft_nms_by_class(const T* boxes, const T* scores, const int64_t* ids, int64_t n, const SoftNmsSettings& settings,
                       T* final_scores) {
  const T threshold = T(settings.score_threshold);  // rounded, as `scores > threshold` in PyTorch rounds
  const std::vector<int32_t> rows = spatial_order(boxes, candidate_rows(boxes, scores, n, threshold));
  const int64_t count = int64_t(rows.size());
  Segments segments = ids ? group_by_id(count, [&](int64_t i) { return ids[rows[i]]; }) : one_segment(count);
  for (int32_t& item : segments.items) item = rows[item];
  std::vector<int32_t> kept_rows(count);
  std::vector<T> kept_scores(count);
  std::fill(final_scores, final_scores + n, T(-1));
  parallel_for(segments.count, segments.grain(256), [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch = allocate_scratch<char>(FASTCV_PICK(soft_nms_scratch_bytes<T>)(segments.longest));
    for (int64_t s = begin; s < end; ++s) {
      const int64_t start = segments.starts[s], stop = segments.starts[s + 1];
      int32_t* items = segments.items.data();
      for (int64_t i = start; i < stop; i += kSoftNmsBlock)
        std::sort(items + i, items + std::min(i + kSoftNmsBlock, stop));
      const SoftNmsSegment<T> segment{.boxes = boxes,
                                      .scores = scores,
                                      .rows = items + start,
                                      .n = stop - start,
                                      .method = settings.method,
                                      .iou_threshold = settings.iou_threshold,
                                      .sigma = settings.sigma,
                                      .score_threshold = threshold,
                                      .kept_rows = kept_rows.data() + start,
                                      .kept_scores = kept_scores.data() + start};
      const int64_t kept = FASTCV_PICK(soft_nms_segment<T>)(segment, scratch.get());
      for (int64_t i = start; i < start + kept; ++i) final_scores[kept_rows[i]] = kept_scores[i];
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor> soft_nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids,
                                          const SoftNmsSettings& settings) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t n = boxes.size(0);
  std::vector<T> final_scores(n);
  soft_nms_by_class(data<T>(boxes), data<T>(scores), ids, n, settings, final_scores.data());
  std::vector<Keyed<decltype(descending_key(T{}))>> ranked;
  for (int64_t i = 0; i < n; ++i)
    if (final_scores[i] > 0) ranked.push_back({descending_key(final_scores[i]), int32_t(i)});
  radix_sort(ranked);
  Tensor indices = empty_cpu({int64_t(ranked.size())}, ScalarType::Long);
  Tensor out = empty_cpu({int64_t(ranked.size())}, dtype);
  int64_t* index = mutable_data<int64_t>(indices);
  T* score = mutable_data<T>(out);
  for (const auto& item : ranked) *index++ = item.row, *score++ = final_scores[item.row];
  return {indices, as_contiguous(out, scores_any.scalar_type())};
}

std::tuple<Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                        double iou_threshold, double sigma, double score_threshold,
                                        const std::string& method) {
  const SoftNmsSettings settings{soft_nms_method(method), iou_threshold, sigma, score_threshold};
  check_soft_nms(boxes, scores, idxs, settings);
  const std::optional<Tensor> ids = as_contiguous(idxs, ScalarType::Long);
  const auto run = either_is_double(boxes, scores) ? soft_nms_typed<double> : soft_nms_typed<float>;
  return run(boxes, scores, ids ? data<int64_t>(*ids) : nullptr, settings);
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) { m.impl("soft_nms", TORCH_BOX(&fastcv::soft_nms_cpu)); }
