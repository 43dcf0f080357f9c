// Tensor shells of box_iou_rotated and nms_rotated.
#include <cmath>

#include "../common/segments.h"
#include "box_iou_rotated_tensors.h"
#include "rotated_columns.h"

namespace fastcv {
namespace {

// Sines and cosines are computed once for each box; columns are zero beyond the last.
struct PreparedBoxes {
  std::vector<double> memory;
  RotatedColumns columns;

  explicit PreparedBoxes(const Tensor& boxes)
      : memory(size_t(RotatedColumns::elements(boxes.size(0)))), columns(memory.data(), boxes.size(0)) {
    const double* from = data<double>(boxes);
    parallel_for(boxes.size(0), 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) columns.set(i, rotated_box(from + 5 * i));
    });
  }
};

Tensor box_iou_rotated_cpu(const Tensor& boxes1_any, const Tensor& boxes2_any, bool wide) {
  check_rotated(boxes1_any, "boxes1"), check_rotated(boxes2_any, "boxes2");
  const PreparedBoxes boxes1(as_contiguous(boxes1_any, ScalarType::Double)),
      boxes2(as_contiguous(boxes2_any, ScalarType::Double));
  const int64_t n = boxes1_any.size(0), m = boxes2_any.size(0);
  Tensor out = empty_cpu({n, m}, wide ? ScalarType::Double : ScalarType::Float);
  const auto rows = [&](auto zero) {
    using T = decltype(zero);
    T* const to = mutable_data<T>(out);
    parallel_dynamic(n, std::max<int64_t>(1, 4096 / std::max<int64_t>(m, 1)), [&](int64_t begin, int64_t end) {
      FASTCV_PICK(box_iou_rotated_rows<T>)(boxes1.columns, boxes2.columns, m, begin, end, to + begin * m);
    });
  };
  wide ? rows(double(0)) : rows(float(0));
  return out;
}

// Rows without NaN, best score first, ties by row.
std::vector<int32_t> ranked_rows(const RotatedColumns& boxes, const double* scores, int64_t n) {
  std::vector<Keyed<uint64_t>> items;
  for (int64_t i = 0; i < n; ++i) {
    bool valid = !std::isnan(scores[i]);
    for (const double* column : boxes.column) valid &= !std::isnan(column[i]);
    if (valid) items.push_back({descending_key(scores[i]), int32_t(i)});
  }
  radix_sort(items);
  std::vector<int32_t> rows(items.size());
  for (size_t i = 0; i < items.size(); ++i) rows[i] = items[i].row;
  return rows;
}

Tensor nms_rotated_cpu(const Tensor& boxes_any, const Tensor& scores_any, const std::optional<Tensor>& idxs,
                       double iou_threshold) {
  check_nms_rotated(boxes_any, scores_any, idxs);
  const PreparedBoxes boxes(as_contiguous(boxes_any, ScalarType::Double));
  const Tensor scores = as_contiguous(scores_any, ScalarType::Double);
  const std::optional<Tensor> ids = as_contiguous(idxs, ScalarType::Long);
  const std::vector<int32_t> rows = ranked_rows(boxes.columns, data<double>(scores), boxes_any.size(0));
  const int64_t n = int64_t(rows.size());
  const int64_t* const id = ids ? data<int64_t>(*ids) : nullptr;
  Segments segments = id ? group_by_id(n, [&](int64_t i) { return id[rows[i]]; }) : one_segment(n);
  std::vector<int32_t> order(rows.size());
  for (int64_t i = 0; i < n; ++i) order[i] = rows[segments.items[i]];
  std::vector<uint8_t> keep(rows.size()), keep_by_rank(rows.size());
  parallel_for(segments.count, segments.grain(512), [&](int64_t begin, int64_t end) {
    const int64_t elements = RotatedColumns::elements(segments.longest);
    const Scratch<double> memory = allocate_scratch<double>(elements);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t start = segments.starts[s];
      std::fill_n(memory.get(), RotatedColumns::elements(segments.size(s)), 0.0);
      FASTCV_PICK(nms_rotated_segment)(boxes.columns, order.data() + start, segments.size(s), iou_threshold,
                                       memory.get(), keep.data() + start);
    }
  });
  for (int64_t i = 0; i < n; ++i) keep_by_rank[segments.items[i]] = keep[i];
  Tensor kept = empty_cpu({int64_t(std::count(keep.begin(), keep.end(), 1))}, ScalarType::Long);
  int64_t* to = mutable_data<int64_t>(kept);
  for (int64_t i = 0; i < n; ++i)
    if (keep_by_rank[i]) *to++ = rows[i];
  return kept;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("box_iou_rotated", TORCH_BOX(&fastcv::box_iou_rotated_cpu));
  m.impl("nms_rotated", TORCH_BOX(&fastcv::nms_rotated_cpu));
}
