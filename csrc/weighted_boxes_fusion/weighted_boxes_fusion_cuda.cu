// Weighted boxes fusion on the device: a block of threads for each label.
//
// Which cluster a box joins depends on where those before it have moved the clusters, so that the boxes of a label
// follow each other: for each, the threads compare it with all clusters and the block finds the best, with one barrier.
// A cluster belongs to one warp, which alone compares and moves it, four lanes a coordinate each, as divisions take
// long. The first 558 clusters of a label lie in shared memory, others in global memory. All sums are those of the CPU
// in its order, in float64, and no multiply-adds are fused: the results are equal.
//
// Before: scores are weighted, one launch for each model, and boxes sorted by score and label. After: clusters are
// scored and sorted. Where the models of a cluster count, pairs of both are sorted.
//
// Bytes: about 240 a box, and 88 more where there are more than 558 boxes. Operations: for each box and each cluster of
// its label 10 instructions where they do not touch, 50 where they do, of float64. Floor for 80 labels of 100 boxes:
// their 80 * 100 * 12 comparisons are nothing; but boxes follow each other, and each waits for its comparison, the
// reductions and a division, some 800 cycles: 0.05 ms, for any number of labels up to that of the blocks that fit into
// the device.
#include <string>

#include "../common/cuda_best.h"
#include "../common/cuda_boxes.h"
#include "../common/cuda_segments.h"
#include "weighted_boxes_fusion_tensors.h"

namespace fastcv::cuda {
namespace {

constexpr int kFuseThreads = 128, kFuseWarps = kFuseThreads / kWarp;
constexpr size_t kMostShared = 48 << 10;

// By row of the boxes given.
struct Rows {
  const double* boxes;  // [N, 4]
  const double* given;  // [N] scores
  double* scores;       // [N] times the weight of the model; -1: takes no part
  double* weights;      // [N]
  int32_t* models;      // [N]
};

struct Member {
  Box<double> box;
  double score;
};

// Boxes in the order of labels and scores.
struct Members {
  Member* member;      // [N]
  double* weight;      // [N] of its model
  const int64_t* row;  // [N]
  int64_t n;
};

// Results, by the row of the first box of each cluster.
struct Fused {
  Box<double>* box;  // [N]
  Cluster* cluster;  // [N]; elsewhere of no boxes
  double* score;     // [N]; elsewhere -1
};

// Boxes begin, ..., begin + count - 1, which are all those of one model.
__global__ void weighted_boxes_fusion_weigh_kernel(Rows rows, int64_t begin, int64_t count, int32_t model,
                                                   double weight, double skip_threshold) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, row = begin + i;
  if (i >= count) return;
  const Box<double> box = load_box(rows.boxes, row);
  const double score = rows.given[row] * weight, a = area(box), infinity = __builtin_inf();
  const bool box_ok = box.x2 > box.x1 && box.y2 > box.y1 && a > 0 && a < infinity;
  const bool takes_part = box_ok && rows.given[row] >= skip_threshold && score >= 0 && score < infinity;
  rows.scores[row] = takes_part ? score : -1;
  rows.weights[row] = weight, rows.models[row] = model;
}

__global__ void weighted_boxes_fusion_gather_kernel(Rows rows, Members members, Fused fused) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= members.n) return;
  const int64_t row = members.row[i];
  members.member[i] = {load_box(rows.boxes, row), rows.scores[row]};
  members.weight[i] = rows.weights[row];
  fused.cluster[row] = Cluster{}, fused.score[row] = -1;
}

struct Sums {
  double coordinates[4];  // times scores
  double score, weight;
  int32_t boxes, first;   // the first box's place in its label
};

// The clusters of a label: the first `capacity` of them in one memory, the rest in another.
struct Clusters {
  Box<double> *near_mean, *far_mean;
  Sums *near_sums, *far_sums;
  int capacity;

  static constexpr size_t kBytes = sizeof(Box<double>) + sizeof(Sums);

  __device__ Box<double>* mean(int k) const { return k < capacity ? near_mean + k : far_mean + (k - capacity); }
  __device__ Sums* sums(int k) const { return k < capacity ? near_sums + k : far_sums + (k - capacity); }
};

// The cluster with which a box has the greatest IoU above the threshold, the first among equals; kNowhere: none.
__device__ unsigned best_match(const Clusters& clusters, int count, const Box<double>& box, double threshold,
                               Best<double>* warps) {
  Best<double> best;
  for (int k = int(threadIdx.x); k < count; k += kFuseThreads) {
    const Box<double> mean = k < clusters.capacity ? clusters.near_mean[k] : clusters.far_mean[k - clusters.capacity];
    if (!touches(mean, box) && threshold >= 0) continue;
    const double o = iou(mean, box);
    if (o > threshold) best.take(o, unsigned(k));
  }
  return best_of_block(best, warps).place;
}

// Adds box i of a label to cluster k, which it opens or joins. By all lanes of the warp to which k belongs. Returns the
// first box of k.
__device__ int add(const Clusters& clusters, int k, bool opens, const Member& m, const double* weight, int i) {
  const int lane = int(threadIdx.x) % kWarp;
  Sums* s = clusters.sums(k);
  const double score = opens ? m.score : s->score + m.score;
  const int first = opens ? i : s->first;
  __syncwarp();
  if (lane < 4) {
    const double coordinate = lane == 0 ? m.box.x1 : lane == 1 ? m.box.y1 : lane == 2 ? m.box.x2 : m.box.y2;
    const double added = m.score * coordinate, sum = opens ? added : s->coordinates[lane] + added;
    double* mean = &clusters.mean(k)->x1 + lane;
    s->coordinates[lane] = sum;
    if (opens)
      *mean = coordinate;
    else if (score > 0)  // of scores of 0 only the first box stands for all
      *mean = sum / score;
  } else if (lane == 4) {
    s->score = score, s->first = first;
    s->weight = opens ? *weight : s->weight + *weight;
    s->boxes = opens ? 1 : s->boxes + 1;
  }
  __syncwarp();
  return first;
}

// far_mean, far_sums: for all boxes, null where clusters.capacity is their number. first_of: [N] the row of the first
// box of the cluster of each; -1: takes no part.
__global__ void __launch_bounds__(kFuseThreads)
    weighted_boxes_fusion_fuse_kernel(Members members, SegmentList labels, double threshold, Clusters clusters,
                                      Fused fused, int64_t* first_of) {
  __shared__ Best<double> warps[2][kFuseWarps];
  clusters.near_mean = dynamic_shared<Box<double>>();
  clusters.near_sums = reinterpret_cast<Sums*>(clusters.near_mean + clusters.capacity);
  const int t = int(threadIdx.x), warp = t / kWarp;
  for (int label = int(blockIdx.x); label < *labels.count; label += int(gridDim.x)) {
    const Segment segment = labels.segments[label];
    Clusters mine = clusters;
    mine.far_mean += segment.begin, mine.far_sums += segment.begin;
    int count = 0, n = segment.end - segment.begin;
    Member next = members.member[segment.begin];
    __syncthreads();  // the last label is done
    for (int i = 0; i < n; ++i) {
      const Member m = next;
      if (m.score < 0) n = i;  // it and those after it take no part
      if (i + 1 < n) next = members.member[segment.begin + i + 1];
      if (i == n) break;
      const unsigned match = best_match(mine, count, m.box, threshold, warps[i % 2]);
      const bool opens = match == kNowhere;
      const int k = opens ? count++ : int(match);
      if (k % kFuseThreads / kWarp != warp) continue;
      const int first = add(mine, k, opens, m, members.weight + segment.begin + i, i);
      if (t % kWarp == 0) first_of[segment.begin + i] = members.row[segment.begin + first];
    }
    for (int i = n + t; i < segment.end - segment.begin; i += kFuseThreads) first_of[segment.begin + i] = -1;
    for (int k = t; k < count; k += kFuseThreads) {
      const Sums s = *mine.sums(k);
      const int64_t first = segment.begin + s.first, row = members.row[first];
      fused.box[row] = *mine.mean(k);
      fused.cluster[row] = {s.score, members.member[first].score, s.weight, 0, s.boxes, int32_t(row)};
    }
  }
}

// Keys whose order is that of clusters, and in each of models.
__global__ void weighted_boxes_fusion_key_kernel(Members members, const int64_t* first_of, const int32_t* model_of,
                                                 int64_t models, int64_t* keys) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < members.n) keys[i] = first_of[i] < 0 ? -1 : first_of[i] * models + model_of[members.row[i]];
}

// by_key: [n] indices of keys, ascending. A thread for each cluster.
__global__ void weighted_boxes_fusion_models_kernel(Members members, const int64_t* keys, const int64_t* by_key,
                                                    int64_t models, Cluster* clusters) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= members.n || keys[by_key[i]] < 0) return;
  const int64_t row = keys[by_key[i]] / models;
  if (i > 0 && keys[by_key[i - 1]] >= row * models) return;
  double weight = 0;
  int64_t before = -1;
  for (int64_t j = i; j < members.n && keys[by_key[j]] < (row + 1) * models; ++j) {
    if (keys[by_key[j]] != before) weight += members.weight[by_key[j]];
    before = keys[by_key[j]];
  }
  clusters[row].models_weight = weight;
}

__global__ void weighted_boxes_fusion_score_kernel(Fused fused, Ensemble ensemble, int64_t n, int32_t* total) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row >= n || fused.cluster[row].boxes == 0) return;
  const double score = fused.cluster[row].score(ensemble);
  if (!(score >= 0)) return;
  fused.score[row] = score;
  atomicAdd(total, 1);
}

struct Output {
  double *boxes, *scores;  // [K, 4], [K]
  int64_t* labels;         // [K]
};

__global__ void weighted_boxes_fusion_output_kernel(Fused fused, const int64_t* ranked, const int64_t* labels,
                                                    int64_t kept, Output out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= kept) return;
  const int64_t row = ranked[i];
  reinterpret_cast<Box<double>*>(out.boxes)[i] = fused.box[row];
  out.scores[i] = fused.score[row], out.labels[i] = labels[row];
}

// ---- shells ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // a label each, or every 1024th

// Memory for n elements on the device of another tensor; lives as long as this does.
template <class T>
struct Array {
  Tensor bytes;
  Array(const Tensor& like, int64_t n) : bytes(empty_on(like, {n * int64_t(sizeof(T))}, ScalarType::Byte)) {}
  T* get() const { return reinterpret_cast<T*>(mutable_data<uint8_t>(bytes)); }
};

struct Arguments {
  Tensor boxes, scores, labels;  // float64, float64, int64
  std::vector<int64_t> counts;
  std::vector<double> weights;
  double iou_threshold, skip_threshold;
  Ensemble ensemble;
};

// Of each cluster: the weight of the models that have a box in it.
void weigh_models(const Stream& stream, const Members& members, const Tensor& first_of, const int32_t* model_of,
                  int64_t models, Cluster* clusters) {
  const int64_t blocks = ceil_div(members.n, kThreads);
  Tensor keys = torch::stable::empty_like(first_of);
  stream.launch(weighted_boxes_fusion_key_kernel, {blocks}, kThreads, 0, members, data<int64_t>(first_of), model_of,
                models, mutable_data<int64_t>(keys));
  const Tensor by_key = stable_argsort(keys, false);
  stream.launch(weighted_boxes_fusion_models_kernel, {blocks}, kThreads, 0, members, data<int64_t>(keys),
                data<int64_t>(by_key), models, clusters);
}

Tensor zero_count(const Tensor& like) {
  return torch::stable::new_zeros(empty_on(like, {0}, ScalarType::Int), {1});
}

// Scores the clusters and sorts them. final_scores: those of `fused`.
std::tuple<Tensor, Tensor, Tensor> results(const Stream& stream, const Arguments& a, const Fused& fused,
                                           const Tensor& final_scores) {
  const int64_t n = a.boxes.size(0);
  Tensor total = zero_count(a.boxes);
  stream.launch(weighted_boxes_fusion_score_kernel, {ceil_div(n, kThreads)}, kThreads, 0, fused, a.ensemble, n,
                mutable_data<int32_t>(total));
  const Tensor ranked = stable_argsort(final_scores, true);
  const int64_t kept = read_first<int32_t>(total, stream);
  Tensor boxes = empty_on(a.boxes, {kept, 4}, ScalarType::Double);
  Tensor scores = empty_on(a.boxes, {kept}, ScalarType::Double), labels = empty_on(a.boxes, {kept}, ScalarType::Long);
  stream.launch(weighted_boxes_fusion_output_kernel, {ceil_div(kept, kThreads)}, kThreads, 0, fused,
                data<int64_t>(ranked), data<int64_t>(a.labels), kept,
                Output{mutable_data<double>(boxes), mutable_data<double>(scores), mutable_data<int64_t>(labels)});
  return {boxes, scores, labels};
}

std::tuple<Tensor, Tensor, Tensor> fuse(const Arguments& a) {
  const Stream stream(a.boxes);
  const int64_t n = a.boxes.size(0), blocks = ceil_div(n, kThreads), models = a.ensemble.models;
  Tensor weighted = torch::stable::empty_like(a.scores), final_scores = torch::stable::empty_like(a.scores);
  Tensor first_of = torch::stable::empty_like(a.labels);
  Tensor label_count = zero_count(a.boxes);
  const Array<double> weights(a.boxes, n);
  const Array<int32_t> model_of(a.boxes, n);
  const Rows rows{data<double>(a.boxes), data<double>(a.scores), mutable_data<double>(weighted), weights.get(),
                  model_of.get()};
  for (int64_t model = 0, begin = 0; model < models; begin += a.counts[model++])
    stream.launch(weighted_boxes_fusion_weigh_kernel, {ceil_div(a.counts[model], kThreads)}, kThreads, 0, rows, begin,
                  a.counts[model], model, a.weights[model], a.skip_threshold);

  const Tensor order = grouped(stable_argsort(weighted, true), a.labels);
  const Array<Member> member(a.boxes, n);
  const Array<double> weight(a.boxes, n);
  const Members members{member.get(), weight.get(), data<int64_t>(order), n};
  const Array<Segment> segments(a.boxes, n);
  const Array<Box<double>> mean(a.boxes, n);
  const Array<Cluster> cluster(a.boxes, n);
  const Fused fused{mean.get(), cluster.get(), mutable_data<double>(final_scores)};
  const SegmentList labels{segments.get(), mutable_data<int32_t>(label_count)};
  stream.launch(weighted_boxes_fusion_gather_kernel, {blocks}, kThreads, 0, rows, members, fused);
  stream.launch(list_segments_kernel<int64_t>, {blocks}, kThreads, 0, data<int64_t>(a.labels), data<int64_t>(order), n,
                labels);
  const int64_t capacity = std::min(n, int64_t(kMostShared / Clusters::kBytes)), far = n > capacity ? n : 0;
  const Array<Box<double>> far_mean(a.boxes, far);
  const Array<Sums> far_sums(a.boxes, far);
  const Clusters clusters{nullptr, far_mean.get(), nullptr, far_sums.get(), int(capacity)};
  stream.launch(weighted_boxes_fusion_fuse_kernel, {std::min(n, kMostBlocks)}, kFuseThreads,
                size_t(capacity) * Clusters::kBytes, members, labels, a.iou_threshold, clusters, fused,
                mutable_data<int64_t>(first_of));
  if (a.ensemble.confidence != Confidence::avg && a.ensemble.confidence != Confidence::max)
    weigh_models(stream, members, first_of, model_of.get(), models, cluster.get());
  return results(stream, a, fused, final_scores);
}

std::tuple<Tensor, Tensor, Tensor> weighted_boxes_fusion_cuda(const Tensor& boxes, const Tensor& scores,
                                                              const Tensor& labels, std::vector<int64_t> counts,
                                                              std::vector<double> weights, double iou_threshold,
                                                              double skip_threshold, std::string conf_type,
                                                              bool allows_overflow) {
  const Ensemble ensemble =
      check_weighted_boxes_fusion(boxes, scores, labels, counts, weights, conf_type, allows_overflow);
  const auto [fused_boxes, fused_scores, fused_labels] =
      fuse({as_contiguous(boxes, ScalarType::Double), as_contiguous(scores, ScalarType::Double),
            as_contiguous(labels, ScalarType::Long), counts, weights, iou_threshold,
            rounded_as(scores, skip_threshold), ensemble});
  return {as_contiguous(fused_boxes, boxes.scalar_type()), as_contiguous(fused_scores, scores.scalar_type()),
          as_contiguous(fused_labels, labels.scalar_type())};
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("weighted_boxes_fusion", TORCH_BOX(&fastcv::cuda::weighted_boxes_fusion_cuda)); }
