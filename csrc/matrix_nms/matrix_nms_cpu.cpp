// Tensor shell of matrix_nms: rank by score, order along a curve, split into classes, run both passes in parallel.
#include <cmath>
#include <type_traits>

#include "../common/segments.h"
#include "../common/spatial_order.h"
#include "matrix_nms_tensors.h"

namespace fastcv {
namespace {

template <class T>
struct Image {
  const T *boxes, *scores;  // [N, 4], [N]
  const int64_t* ids;       // [N] or null
  int64_t n;
};

struct Decay {
  bool linear;
  double sigma;
};

// A class of one image with its scratch memory.
template <class T>
struct Task {
  MatrixNmsSegment<T> segment;
  void* scratch;
};

// Rows without NaN, and the place by score of each row (ties by row).
template <class T>
std::vector<int32_t> ranked_rows(const Image<T>& image, std::vector<int32_t>& rank_of_row) {
  std::vector<Keyed<decltype(descending_key(T{}))>> items;
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < image.n; ++i) {
    const T *b = image.boxes + 4 * i, score = image.scores[i];
    if (std::isnan(score) || std::isnan(b[0]) || std::isnan(b[1]) || std::isnan(b[2]) || std::isnan(b[3])) continue;
    items.push_back({descending_key(score), int32_t(i)});
    rows.push_back(int32_t(i));
  }
  radix_sort(items);
  rank_of_row.resize(image.n);
  for (size_t rank = 0; rank < items.size(); ++rank) rank_of_row[items[rank].row] = int32_t(rank);
  return rows;
}

// Both passes over all blocks of all classes.
template <class T>
void run_passes(const std::vector<Task<T>>& tasks) {
  std::vector<int64_t> first_block{0};
  for (const auto& task : tasks)
    first_block.push_back(first_block.back() + (task.segment.n + kMatrixNmsBlock - 1) / kMatrixNmsBlock);
  const auto over_blocks = [&](const auto& pass) {
    parallel_for(first_block.back(), 4, [&](int64_t begin, int64_t end) {
      size_t t = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
      for (int64_t block = begin; block < end; block = first_block[++t]) {
        const int64_t stop = std::min(end, first_block[t + 1]);
        pass(tasks[t].segment, tasks[t].scratch, block - first_block[t], stop - first_block[t]);
      }
    });
  };
  over_blocks(FASTCV_PICK(matrix_nms_overlap<T>));
  over_blocks(FASTCV_PICK(matrix_nms_decay<T>));
}

// Writes the decayed score of each row of one image; 0 where a row has a NaN.
template <class T>
void decay_scores(const Image<T>& image, Decay decay, T* out) {
  std::vector<int32_t> rank_of_row;
  const std::vector<int32_t> rows = spatial_order(image.boxes, ranked_rows(image, rank_of_row));
  const int64_t count = int64_t(rows.size());
  const auto id_of = [&](int64_t i) { return image.ids[rows[i]]; };
  Segments segments = image.ids ? group_by_id(count, id_of) : one_segment(count);
  std::vector<int32_t> ranks(count);
  for (int64_t i = 0; i < count; ++i) {
    segments.items[i] = rows[segments.items[i]];
    ranks[i] = rank_of_row[segments.items[i]];
  }
  size_t bytes = 0;
  for (int64_t s = 0; s < segments.count; ++s) bytes += FASTCV_PICK(matrix_nms_scratch_bytes<T>)(segments.size(s));
  const Scratch<char> scratch = allocate_scratch<char>(bytes);
  std::vector<T> factors(count);
  std::vector<Task<T>> tasks;
  char* memory = scratch.get();
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t start = segments.starts[s], n = segments.size(s);
    const MatrixNmsSegment<T> segment{.boxes = image.boxes,
                                      .rows = segments.items.data() + start,
                                      .ranks = ranks.data() + start,
                                      .n = n,
                                      .linear = decay.linear,
                                      .sigma = decay.sigma,
                                      .decay = factors.data() + start};
    tasks.push_back({segment, memory});
    FASTCV_PICK(matrix_nms_prepare<T>)(tasks.back().segment, memory);
    memory += FASTCV_PICK(matrix_nms_scratch_bytes<T>)(n);
  }
  run_passes(tasks);
  std::fill(out, out + image.n, T(0));
  for (int64_t i = 0; i < count; ++i)  // no product with 0: the score may be infinite
    if (factors[i] > 0) out[segments.items[i]] = image.scores[segments.items[i]] * factors[i];
}

template <class T>
Tensor matrix_nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const int64_t* ids, Decay decay) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t images = boxes.size(0), n = boxes.size(1);
  Tensor out = empty_cpu({images, n}, dtype);
  T* out_data = mutable_data<T>(out);
  // Fewer images than threads run one after another: then their blocks run in parallel.
  const int64_t grain = images >= int64_t(torch::stable::get_num_threads()) ? 1 : images;
  parallel_for(images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      decay_scores(Image<T>{data<T>(boxes) + b * n * 4, data<T>(scores) + b * n, ids ? ids + b * n : nullptr, n}, decay,
                   out_data + b * n);
  });
  return as_contiguous(out, scores_any.scalar_type());
}

Tensor matrix_nms_cpu(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double sigma,
                      bool linear) {
  check_matrix_nms(boxes, scores, idxs);
  const std::optional<Tensor> ids = as_contiguous(idxs, ScalarType::Long);
  const auto run = either_is_double(boxes, scores) ? matrix_nms_typed<double> : matrix_nms_typed<float>;
  return run(boxes, scores, ids ? data<int64_t>(*ids) : nullptr, {linear, sigma});
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) { m.impl("matrix_nms", TORCH_BOX(&fastcv::matrix_nms_cpu)); }
