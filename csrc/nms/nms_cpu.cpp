// Tensor shells of nms, batched_nms and nms_padded: sort, split into segments, run the kernel, gather what was kept.
#include "nms.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../common/radix_sort.h"
#include "../common/stable.h"

namespace fastcv {
namespace {

template <class T>
using ScoreKey = decltype(descending_key(T{}));

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, Free>;

Scratch allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  STD_TORCH_CHECK(p, "nms: cannot allocate ", bytes, " bytes of scratch memory");
  return Scratch(p);
}

template <class T>
struct Candidates {
  const T* boxes;   // [N, 4]
  const T* scores;  // [N]
  int64_t n;
  double score_threshold;  // candidates score above it; -infinity admits a score of -infinity too
};

struct Criterion {
  double iou_threshold;
  bool diou;
};

// Rows that take part, best score first, ties by row. A box or score with NaN takes no part.
template <class T>
std::vector<int32_t> ranked_rows(const Candidates<T>& c) {
  STD_TORCH_CHECK(c.n < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 boxes, got ", c.n);
  std::vector<Keyed<ScoreKey<T>>> items;
  items.reserve(c.n);
  for (int64_t i = 0; i < c.n; ++i) {
    const T* b = c.boxes + 4 * i;
    const T score = c.scores[i];
    const bool admitted = score > c.score_threshold || c.score_threshold == -std::numeric_limits<double>::infinity();
    const bool nan = std::isnan(score) || std::isnan(b[0]) || std::isnan(b[1]) || std::isnan(b[2]) || std::isnan(b[3]);
    if (admitted && !nan) items.push_back({descending_key(score), int32_t(i)});
  }
  radix_sort(items);
  std::vector<int32_t> rows(items.size());
  for (size_t i = 0; i < items.size(); ++i) rows[i] = items[i].row;
  return rows;
}

// Suppression among ranked rows; returns the kept ones, still ranked.
template <class T>
std::vector<int32_t> suppress(const T* boxes, std::vector<int32_t> rows, Criterion criterion, int64_t max_keep) {
  const int64_t n = int64_t(rows.size());
  std::vector<uint8_t> keep(n);
  Scratch scratch = allocate(FASTCV_PICK(nms_scratch_bytes<T>)(n));
  NmsSegment<T> segment{boxes, rows.data(), n, criterion.iou_threshold, criterion.diou, keep.data(), max_keep};
  FASTCV_PICK(nms_segment<T>)(segment, scratch.get());
  size_t kept = 0;
  for (int64_t i = 0; i < n; ++i)
    if (keep[i]) rows[kept++] = rows[i];
  rows.resize(kept);
  return rows;
}

// The same within each class: ids are compared, coordinates are never shifted, and classes run in parallel.
template <class T>
std::vector<int32_t> suppress_by_class(const T* boxes, const int64_t* ids, const std::vector<int32_t>& rows,
                                       Criterion criterion) {
  const int64_t n = int64_t(rows.size());
  std::vector<Keyed<uint64_t>> ranks(n);  // ranks grouped by class; the stable sort keeps the order within a class
  for (int64_t rank = 0; rank < n; ++rank) ranks[rank] = {uint64_t(ids[rows[rank]]), int32_t(rank)};
  radix_sort(ranks);
  std::vector<int64_t> starts;
  std::vector<int32_t> grouped(n);
  for (int64_t i = 0; i < n; ++i) {
    grouped[i] = rows[ranks[i].row];
    if (i == 0 || ranks[i].key != ranks[i - 1].key) starts.push_back(i);
  }
  const int64_t segments = int64_t(starts.size());
  starts.push_back(n);
  std::vector<uint8_t> keep(n), keep_by_rank(n);
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) longest = std::max(longest, starts[s + 1] - starts[s]);
  const int64_t grain = std::max<int64_t>(1, 2048 * segments / std::max<int64_t>(n, 1));
  parallel_for(segments, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch = allocate(FASTCV_PICK(nms_scratch_bytes<T>)(longest));
    for (int64_t s = begin; s < end; ++s) {
      NmsSegment<T> segment{boxes,          grouped.data() + starts[s], starts[s + 1] - starts[s], criterion.iou_threshold,
                            criterion.diou, keep.data() + starts[s],    n};
      FASTCV_PICK(nms_segment<T>)(segment, scratch.get());
    }
  });
  for (int64_t i = 0; i < n; ++i) keep_by_rank[ranks[i].row] = keep[i];
  std::vector<int32_t> kept;
  for (int64_t rank = 0; rank < n; ++rank)
    if (keep_by_rank[rank]) kept.push_back(rows[rank]);
  return kept;
}

bool is_double(const Tensor& boxes, const Tensor& scores) {
  return boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double;
}

void check_boxes(const Tensor& boxes, const Tensor& scores) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes: expected shape [N, 4]");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "scores: expected shape [", boxes.size(0), "]");
}

template <class T>
Tensor nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids, Criterion criterion) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const Candidates<T> candidates{data<T>(boxes), data<T>(scores), boxes.size(0),
                                 -std::numeric_limits<double>::infinity()};
  const std::vector<int32_t> rows = ranked_rows(candidates);
  const std::vector<int32_t> kept = ids ? suppress_by_class(candidates.boxes, ids, rows, criterion)
                                        : suppress(candidates.boxes, rows, criterion, boxes.size(0));
  Tensor out = empty_cpu({int64_t(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), mutable_data<int64_t>(out));
  return out;
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, double iou_threshold, bool diou) {
  check_boxes(boxes, scores);
  const Criterion criterion{iou_threshold, diou};
  return is_double(boxes, scores) ? nms_typed<double>(boxes, scores, nullptr, criterion)
                                  : nms_typed<float>(boxes, scores, nullptr, criterion);
}

Tensor batched_nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold, bool diou) {
  check_boxes(boxes, scores);
  STD_TORCH_CHECK(idxs.dim() == 1 && idxs.size(0) == boxes.size(0), "idxs: expected shape [", boxes.size(0), "]");
  const Tensor ids = as_contiguous(idxs, ScalarType::Long);
  const Criterion criterion{iou_threshold, diou};
  return is_double(boxes, scores) ? nms_typed<double>(boxes, scores, data<int64_t>(ids), criterion)
                                  : nms_typed<float>(boxes, scores, data<int64_t>(ids), criterion);
}

// One image of nms_padded: rows kept in each class, merged by score.
template <class T>
std::vector<std::pair<int64_t, int32_t>> merge_classes(const T* scores, int64_t n, int64_t limit,
                                                       const std::vector<int32_t>* per_class, int64_t classes) {
  std::vector<Keyed<ScoreKey<T>>> items;
  std::vector<std::pair<int64_t, int32_t>> flat, merged;
  for (int64_t c = 0; c < classes; ++c)
    for (int32_t row : per_class[c]) {
      items.push_back({descending_key(scores[c * n + row]), int32_t(flat.size())});
      flat.push_back({c, row});
    }
  // Rows of one class come by score, not by index; among equal scores of one class they are by index, so stability
  // gives "lowest class, then lowest index".
  radix_sort(items);
  for (size_t i = 0; i < items.size() && int64_t(i) < limit; ++i) merged.push_back(flat[items[i].row]);
  return merged;
}

template <class T>
void nms_padded_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids, Criterion criterion,
                      double score_threshold, int64_t* indices, int64_t* labels, int64_t* counts, int64_t limit) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t images = boxes.size(0), n = boxes.size(1), classes = scores.dim() == 3 ? scores.size(1) : 1;
  std::vector<std::vector<int32_t>> kept(images * classes);
  parallel_for(images * classes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* image_boxes = data<T>(boxes) + p / classes * n * 4;
      std::vector<int32_t> rows = ranked_rows(Candidates<T>{image_boxes, data<T>(scores) + p * n, n, score_threshold});
      kept[p] = ids ? suppress_by_class(image_boxes, ids + p * n, rows, criterion)
                    : suppress(image_boxes, std::move(rows), criterion, limit);
    }
  });
  for (int64_t image = 0; image < images; ++image) {
    const auto merged =
        merge_classes(data<T>(scores) + image * classes * n, n, limit, kept.data() + image * classes, classes);
    for (int64_t k = 0; k < limit; ++k) {
      const bool valid = k < int64_t(merged.size());
      indices[image * limit + k] = valid ? merged[k].second : -1;
      labels[image * limit + k] = !valid ? -1 : ids ? ids[image * n + merged[k].second] : merged[k].first;
    }
    counts[image] = int64_t(merged.size());
  }
}

std::tuple<Tensor, Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                  const std::optional<Tensor>& idxs, double iou_threshold,
                                                  int64_t max_output, double score_threshold, bool diou) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes: expected shape [B, N, 4]");
  STD_TORCH_CHECK(max_output >= 0, "max_output: expected at least 0, got ", max_output);
  const int64_t images = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK((scores.dim() == 2 || scores.dim() == 3) && scores.size(0) == images && scores.size(-1) == n,
                  "scores: expected shape [B, N] or [B, C, N] with B = ", images, ", N = ", n);
  std::optional<Tensor> ids;
  if (idxs) {
    STD_TORCH_CHECK(scores.dim() == 2 && idxs->dim() == 2 && idxs->size(0) == images && idxs->size(1) == n,
                    "idxs: expected shape [B, N] = [", images, ", ", n, "], with scores of the same shape");
    ids = as_contiguous(*idxs, ScalarType::Long);
  }
  Tensor indices = empty_cpu({images, max_output}, ScalarType::Long);
  Tensor labels = empty_cpu({images, max_output}, ScalarType::Long);
  Tensor counts = empty_cpu({images}, ScalarType::Long);
  const auto run = is_double(boxes, scores) ? nms_padded_typed<double> : nms_padded_typed<float>;
  run(boxes, scores, ids ? data<int64_t>(*ids) : nullptr, Criterion{iou_threshold, diou}, score_threshold,
      mutable_data<int64_t>(indices), mutable_data<int64_t>(labels), mutable_data<int64_t>(counts), max_output);
  return {indices, labels, counts};
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("nms", TORCH_BOX(&fastcv::nms_cpu));
  m.impl("batched_nms", TORCH_BOX(&fastcv::batched_nms_cpu));
  m.impl("nms_padded", TORCH_BOX(&fastcv::nms_padded_cpu));
}
