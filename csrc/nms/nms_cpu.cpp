// Tensor shells of nms, batched_nms and nms_padded: select, sort, split into segments, run the kernel, merge.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../common/segments.h"
#include "nms.h"
#include "nms_tensors.h"

namespace fastcv {
namespace {

template <class T>
using Item = Keyed<decltype(descending_key(T{}))>;

// One image. A candidate is a pair of a class and a row, numbered class * n + row; with ids there is one score a row.
template <class T>
struct Image {
  const T* boxes;      // [N, 4]
  const T* scores;     // [C, N]
  const int64_t* ids;  // [N] or null
  int64_t n, classes;

  int64_t row_of(int32_t candidate) const { return classes == 1 ? candidate : candidate % n; }
  int64_t id_of(int32_t candidate) const { return ids ? ids[candidate] : classes == 1 ? 0 : candidate / n; }
};

// Candidates of one class whose score passes; a box or score with NaN takes no part.
template <class T>
void append_candidates(const Image<T>& image, int64_t c, double score_threshold, std::vector<Item<T>>& items) {
  const T* scores = image.scores + c * image.n;
  const Scratch<int32_t> row = allocate_scratch<int32_t>(image.n);
  // Without a threshold a score of -infinity is admitted too. Rounded to T, as `scores > threshold` in PyTorch rounds.
  const int64_t count =
      FASTCV_PICK(select_scores<T>)(scores, image.n, T(score_threshold), score_threshold == kNoThreshold, row.get());
  items.reserve(items.size() + count);
  for (int64_t i = 0; i < count; ++i) {
    const T* b = image.boxes + 4 * int64_t(row[i]);
    if (std::isnan(b[0]) || std::isnan(b[1]) || std::isnan(b[2]) || std::isnan(b[3])) continue;
    items.push_back({descending_key(scores[row[i]]), int32_t(c * image.n + row[i])});
  }
}

// By class, then row: a stable sort leaves equal scores in that order.
template <class T>
std::vector<Item<T>> candidates(const Image<T>& image, double score_threshold) {
  STD_TORCH_CHECK(image.classes * image.n < std::numeric_limits<int32_t>::max(),
                  "boxes: expected fewer than 2^31 scores an image, got ", image.classes * image.n);
  std::vector<std::vector<Item<T>>> per_class(image.classes);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(image.n, 1));
  parallel_for(image.classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) append_candidates(image, c, score_threshold, per_class[c]);
  });
  if (image.classes == 1) return std::move(per_class[0]);
  size_t total = 0;
  for (const auto& items : per_class) total += items.size();
  std::vector<Item<T>> all;
  all.reserve(total);
  for (const auto& items : per_class) all.insert(all.end(), items.begin(), items.end());
  return all;
}

// The best candidates, at least `wanted` (or all), in the order they have: all that share the leading 16 bits of their
// score with one of the best are in.
template <class T>
std::vector<Item<T>> best_of(const std::vector<Item<T>>& items, int64_t wanted) {
  if (int64_t(items.size()) <= 2 * wanted) return items;
  constexpr int kShift = 8 * sizeof(Item<T>::key) - 16;
  std::vector<int32_t> histogram(1 << 16);
  for (const auto& item : items) ++histogram[item.key >> kShift];
  int64_t count = 0;
  uint32_t last = 0;
  while ((count += histogram[last]) < wanted) ++last;
  std::vector<Item<T>> best;
  best.reserve(count);
  for (const auto& item : items)
    if (item.key >> kShift <= last) best.push_back(item);
  return best;
}

// Suppression within each class among candidates sorted by score; returns the kept ones, still sorted. Ids are
// compared, coordinates are never shifted, and classes run in parallel.
template <class T>
std::vector<int32_t> suppress(const Image<T>& image, const std::vector<Item<T>>& ranked, Criterion criterion,
                              int64_t max_keep) {
  const int64_t n = int64_t(ranked.size());
  const bool one_class = !image.ids && image.classes == 1;
  const auto id_of = [&](int64_t rank) { return image.id_of(ranked[rank].row); };
  const Segments segments = one_class ? one_segment(n) : group_by_id(n, id_of);
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = int32_t(image.row_of(ranked[segments.items[i]].row));
  std::vector<uint8_t> keep(n), keep_by_rank(n);
  parallel_for(segments.count, segments.grain(2048), [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch = allocate_scratch<char>(FASTCV_PICK(nms_scratch_bytes<T>)(segments.longest));
    for (int64_t s = begin; s < end; ++s) {
      const int64_t start = segments.starts[s];
      const NmsSegment<T> segment{.boxes = image.boxes,
                                  .order = rows.data() + start,
                                  .n = segments.size(s),
                                  .iou_threshold = criterion.iou_threshold,
                                  .diou = criterion.diou,
                                  .keep = keep.data() + start,
                                  .max_keep = max_keep};
      FASTCV_PICK(nms_segment<T>)(segment, scratch.get());
    }
  });
  for (int64_t i = 0; i < n; ++i) keep_by_rank[segments.items[i]] = keep[i];
  std::vector<int32_t> kept;
  for (int64_t rank = 0; rank < n && int64_t(kept.size()) < max_keep; ++rank)
    if (keep_by_rank[rank]) kept.push_back(ranked[rank].row);
  return kept;
}

// The best `limit` detections. What is kept among the best candidates does not depend on the others, so the best are
// tried first, and more of them only where those leave too few.
template <class T>
std::vector<int32_t> detect(const Image<T>& image, double score_threshold, Criterion criterion, int64_t limit) {
  if (limit == 0) return {};
  const std::vector<Item<T>> items = candidates(image, score_threshold);
  const int64_t n = int64_t(items.size());
  for (int64_t wanted = limit < n ? std::max<int64_t>(2048, 8 * limit) : n;; wanted *= 8) {
    std::vector<Item<T>> ranked = best_of<T>(items, wanted);
    radix_sort(ranked);
    std::vector<int32_t> kept = suppress(image, ranked, criterion, limit);
    if (int64_t(kept.size()) == limit || ranked.size() == items.size()) return kept;
  }
}

template <class T>
Tensor nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids, Criterion criterion) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t n = boxes.size(0);
  const Image<T> image{data<T>(boxes), data<T>(scores), ids, n, 1};
  const std::vector<int32_t> kept = detect(image, kNoThreshold, criterion, n);
  Tensor out = empty_cpu({int64_t(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), mutable_data<int64_t>(out));
  return out;
}

Tensor nms_any(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, Criterion criterion) {
  check_nms(boxes, scores, idxs);
  const std::optional<Tensor> ids = as_contiguous(idxs, ScalarType::Long);
  const auto run = either_is_double(boxes, scores) ? nms_typed<double> : nms_typed<float>;
  return run(boxes, scores, ids ? data<int64_t>(*ids) : nullptr, criterion);
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, double iou_threshold, bool diou) {
  return nms_any(boxes, scores, std::nullopt, {iou_threshold, diou});
}

Tensor batched_nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold, bool diou) {
  return nms_any(boxes, scores, idxs, {iou_threshold, diou});
}

template <class T>
void nms_padded_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids, Criterion criterion,
                      double score_threshold, const PaddedOutput& out) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t images = boxes.size(0), n = boxes.size(1), classes = scores.dim() == 3 ? scores.size(1) : 1;
  // Fewer images than threads run one after another: then their classes run in parallel.
  const int64_t grain = images >= int64_t(torch::stable::get_num_threads()) ? 1 : images;
  parallel_for(images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Image<T> image{data<T>(boxes) + b * n * 4, data<T>(scores) + b * classes * n, ids ? ids + b * n : nullptr,
                           n, classes};
      const std::vector<int32_t> kept = detect(image, score_threshold, criterion, out.limit);
      for (int64_t k = 0; k < out.limit; ++k) {
        const bool valid = k < int64_t(kept.size());
        out.indices[b * out.limit + k] = valid ? image.row_of(kept[k]) : -1;
        out.labels[b * out.limit + k] = valid ? image.id_of(kept[k]) : -1;
      }
      out.counts[b] = int64_t(kept.size());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                  const std::optional<Tensor>& idxs, double iou_threshold,
                                                  int64_t max_output, double score_threshold, bool diou) {
  check_nms_padded(boxes, scores, idxs, max_output);
  const int64_t images = boxes.size(0);
  const std::optional<Tensor> ids = as_contiguous(idxs, ScalarType::Long);
  Tensor indices = empty_cpu({images, max_output}, ScalarType::Long);
  Tensor labels = empty_cpu({images, max_output}, ScalarType::Long);
  Tensor counts = empty_cpu({images}, ScalarType::Long);
  const PaddedOutput out{mutable_data<int64_t>(indices), mutable_data<int64_t>(labels), mutable_data<int64_t>(counts),
                         max_output};
  const auto run = either_is_double(boxes, scores) ? nms_padded_typed<double> : nms_padded_typed<float>;
  run(boxes, scores, ids ? data<int64_t>(*ids) : nullptr, {iou_threshold, diou}, score_threshold, out);
  return {indices, labels, counts};
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("nms", TORCH_BOX(&fastcv::nms_cpu));
  m.impl("batched_nms", TORCH_BOX(&fastcv::batched_nms_cpu));
  m.impl("nms_padded", TORCH_BOX(&fastcv::nms_padded_cpu));
}
