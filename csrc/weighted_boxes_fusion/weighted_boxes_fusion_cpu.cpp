// Tensor shell of weighted_boxes_fusion: select, sort, split into classes, cluster, score the clusters, sort them.
#include <algorithm>
#include <cmath>
#include <string>

#include "../common/segments.h"
#include "weighted_boxes_fusion_tensors.h"

namespace fastcv {
namespace {

// All boxes, and which model each is from.
struct Detections {
  const double* boxes;                 // [N, 4]
  const std::vector<double>& weights;  // of the models
  std::vector<double> scores;          // [N] times the weight of the model
  std::vector<int32_t> models;         // [N]
};

// Rows that take part, best weighted score first, ties by row.
std::vector<int32_t> ranked_rows(const Detections& d, const double* scores, double skip_threshold) {
  std::vector<Keyed<uint64_t>> items;
  for (size_t i = 0; i < d.scores.size(); ++i) {
    const double* b = d.boxes + 4 * i;
    const double area = (b[2] - b[0]) * (b[3] - b[1]);
    const bool box_ok = b[2] > b[0] && b[3] > b[1] && area > 0 && std::isfinite(area);
    if (box_ok && scores[i] >= skip_threshold && d.scores[i] >= 0 && std::isfinite(d.scores[i]))
      items.push_back({descending_key(d.scores[i]), int32_t(i)});
  }
  radix_sort(items);
  std::vector<int32_t> rows(items.size());
  for (size_t i = 0; i < items.size(); ++i) rows[i] = items[i].row;
  return rows;
}

std::vector<Cluster> add_up(const FusionSegment& s, int64_t count, const Detections& d, const Ensemble& e) {
  std::vector<Cluster> clusters(count);
  std::vector<std::pair<int32_t, int32_t>> seen;  // (cluster, model)
  for (int64_t i = 0; i < s.n; ++i) {
    Cluster& c = clusters[s.cluster[i]];
    const int32_t row = s.rows[i];
    if (c.first_row < 0) c.first_row = row;
    c.score_sum += d.scores[row];
    c.best_score = std::max(c.best_score, d.scores[row]);
    c.weight_sum += d.weights[d.models[row]];
    ++c.boxes;
    seen.push_back({s.cluster[i], d.models[row]});
  }
  if (e.confidence != Confidence::avg && e.confidence != Confidence::max) {
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (const auto& [cluster, model] : seen) clusters[cluster].models_weight += d.weights[model];
  }
  return clusters;
}

struct Fused {
  std::vector<double> boxes;        // [N, 4]
  std::vector<double> scores;       // [N]
  std::vector<int32_t> ranked;      // the places of clusters in boxes and scores, best score first
};

// The result of a cluster is written at the row of its first box, so that ties go to the lowest row.
Fused fuse(const Detections& d, const double* scores, const int64_t* labels, double iou_threshold,
           double skip_threshold, const Ensemble& ensemble) {
  const std::vector<int32_t> rows = ranked_rows(d, scores, skip_threshold);
  const int64_t n = int64_t(rows.size());
  Segments segments = group_by_id(n, [&](int64_t i) { return labels[rows[i]]; });
  for (int32_t& item : segments.items) item = rows[item];
  std::vector<int32_t> cluster(n);
  std::vector<double> means(4 * n);
  std::vector<uint8_t> written(d.scores.size());
  Fused fused{std::vector<double>(4 * d.scores.size()), std::vector<double>(d.scores.size()), {}};
  parallel_for(segments.count, segments.grain(256), [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch = allocate_scratch<char>(FASTCV_PICK(fuse_scratch_bytes)(segments.longest));
    for (int64_t s = begin; s < end; ++s) {
      const int64_t start = segments.starts[s];
      const FusionSegment segment{.boxes = d.boxes,
                                  .scores = d.scores.data(),
                                  .rows = segments.items.data() + start,
                                  .n = segments.size(s),
                                  .iou_threshold = iou_threshold,
                                  .cluster = cluster.data() + start,
                                  .fused = means.data() + 4 * start};
      const int64_t count = FASTCV_PICK(fuse_segment)(segment, scratch.get());
      const std::vector<Cluster> clusters = add_up(segment, count, d, ensemble);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t row = clusters[c].first_row;
        std::copy_n(segment.fused + 4 * c, 4, fused.boxes.data() + 4 * row);
        fused.scores[row] = clusters[c].score(ensemble);
        written[row] = 1;
      }
    }
  });
  std::vector<Keyed<uint64_t>> items;
  for (size_t row = 0; row < written.size(); ++row)
    if (written[row]) items.push_back({descending_key(fused.scores[row]), int32_t(row)});
  radix_sort(items);
  for (const auto& item : items) fused.ranked.push_back(item.row);
  return fused;
}

std::tuple<Tensor, Tensor, Tensor> weighted_boxes_fusion_cpu(const Tensor& boxes_any, const Tensor& scores_any,
                                                             const Tensor& labels_any, std::vector<int64_t> counts,
                                                             std::vector<double> weights, double iou_threshold,
                                                             double skip_threshold, std::string conf_type,
                                                             bool allows_overflow) {
  const Ensemble ensemble = check_weighted_boxes_fusion(boxes_any, scores_any, labels_any, counts, weights, conf_type,
                                                        allows_overflow);
  const Tensor boxes = as_contiguous(boxes_any, ScalarType::Double);
  const Tensor scores = as_contiguous(scores_any, ScalarType::Double);
  const Tensor labels = as_contiguous(labels_any, ScalarType::Long);
  Detections detections{data<double>(boxes), weights, {}, {}};
  const double* score_of_row = data<double>(scores);
  for (size_t model = 0; model < counts.size(); ++model) {
    for (int64_t i = 0; i < counts[model]; ++i) {
      detections.scores.push_back(*score_of_row++ * weights[model]);
      detections.models.push_back(int32_t(model));
    }
  }
  const Fused fused = fuse(detections, data<double>(scores), data<int64_t>(labels), iou_threshold,
                           rounded_as(scores_any, skip_threshold), ensemble);
  const int64_t kept = int64_t(fused.ranked.size());
  Tensor out_boxes = empty_cpu({kept, 4}, ScalarType::Double), out_scores = empty_cpu({kept}, ScalarType::Double);
  Tensor out_labels = empty_cpu({kept}, ScalarType::Long);
  double *box = mutable_data<double>(out_boxes), *score = mutable_data<double>(out_scores);
  int64_t* label = mutable_data<int64_t>(out_labels);
  const int64_t* label_of_row = data<int64_t>(labels);
  for (int32_t row : fused.ranked) {
    box = std::copy_n(fused.boxes.data() + 4 * int64_t(row), 4, box);
    *score++ = fused.scores[row];
    *label++ = label_of_row[row];
  }
  return {as_contiguous(out_boxes, boxes_any.scalar_type()), as_contiguous(out_scores, scores_any.scalar_type()),
          as_contiguous(out_labels, labels_any.scalar_type())};
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("weighted_boxes_fusion", TORCH_BOX(&fastcv::weighted_boxes_fusion_cpu));
}
