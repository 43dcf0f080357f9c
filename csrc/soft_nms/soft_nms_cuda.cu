// Soft-NMS on the device: a block of threads for each class.
//
// A step is one pass of the threads over the boxes of the class that are left: each lowers the scores of its boxes by
// the box chosen last and finds the best of them; then the block finds the best of all, with one barrier. Boxes and
// scores lie in shared memory, in the order of their rows, so that ties go to the lowest. Those that take no part any
// more are passed over, and removed every 64 steps. A class of more boxes than fit (4096 in float32, 2457 in float64)
// begins in global memory, and moves when enough are gone.
//
// Bytes: 24 a box (40 in float64) in shared memory, read once a step; another 24 of global memory where there are more
// boxes than fit into shared memory, and 40 for sorting and results. Operations: for each box chosen and each left, 10
// instructions where they do not touch, 40 where they do. Floor for 80 classes of 500 boxes, of which all are chosen:
// 80 * 500 * 500 / 2 pairs, 0.01 ms at 30e12 instructions a second; but steps follow each other, and each waits for its
// reductions, some 500 cycles: 0.15 ms, for any number of classes up to that of the multiprocessors.
//
// The IoU is computed as torchvision computes it; this file is compiled without fused multiply-adds, so that the boxes
// chosen are those that the CPU chooses.
#include <string>

#include "../common/cuda_best.h"
#include "../common/cuda_boxes.h"
#include "../common/cuda_places.h"
#include "../common/cuda_segments.h"
#include "soft_nms_tensors.h"

namespace fastcv::cuda {
namespace {

constexpr int kMostThreads = 512, kMostWarps = kMostThreads / kWarp;  // of a block: a power of two
constexpr int kStepsToCompact = 64;
constexpr size_t kMostShared = 96 << 10;  // every architecture since sm_80 has it

// All boxes and their classes.
template <class T>
struct Detections {
  const T* boxes;        // [N, 4]
  const T* scores;       // [N]
  const int64_t* order;  // [N] rows by class, ascending in each; null: one class
  SegmentList classes;
};

template <class T>
struct Decay {
  SoftNmsMethod method;
  T iou_threshold, minus_inverse_sigma, score_threshold;
  bool everywhere;  // boxes that do not overlap have IoU 0, above a negative threshold

  __device__ T factor(T o) const {
    if (method == SoftNmsMethod::naive) return o > iou_threshold ? T(0) : T(1);
    if (method == SoftNmsMethod::linear) return o > iou_threshold ? 1 - o : T(1);
    return o > 0 ? std::exp(o * o * minus_inverse_sigma) : T(1);
  }
};

template <class T>
struct Candidate {
  Box<T> box;
  T score;  // 0: takes no part
  int32_t row;
};

// Boxes of a class, in shared or global memory. Between compactions thread t alone writes boxes t, t + threads, ...
template <class T>
struct Pool {
  Box<T>* box;   // [size]
  T* score;      // [size]
  int32_t* row;  // [size]

  static constexpr size_t kBytes = sizeof(Box<T>) + sizeof(T) + sizeof(int32_t);

  // Room for `size` boxes in memory of size * kBytes.
  __device__ Pool(void* memory, int64_t size)
      : box(static_cast<Box<T>*>(memory)),
        score(reinterpret_cast<T*>(box + size)),
        row(reinterpret_cast<int32_t*>(score + size)) {}
  // From box `at` on.
  __device__ Pool(const Pool& pool, int64_t at) : box(pool.box + at), score(pool.score + at), row(pool.row + at) {}

  __device__ Candidate<T> read(int i) const { return {box[i], score[i], row[i]}; }
  __device__ void write(int i, const Candidate<T>& c) const { box[i] = c.box, score[i] = c.score, row[i] = c.row; }
};

// Writes those of candidates 0, ..., n - 1 that take part to the pool, in their order; returns how many. They may be
// those of the pool itself.
template <class T, class Read>
__device__ int compact(const Pool<T>& pool, int n, const Read& read) {
  __shared__ int count[kMostWarps];
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  int size = 0;
  for (int tile = 0; tile < n; tile += threads) {
    Candidate<T> mine{};
    if (tile + t < n) mine = read(tile + t);
    const Place place = place_in_block(mine.score > 0, count, threads / kWarp);
    if (mine.score > 0) pool.write(size + place.before, mine);
    size += place.all;
    __syncthreads();
  }
  return size;
}

// Chooses boxes of the pool, and writes their scores at their rows, until none is left or, after a compaction, no more
// than `enough`. `last`: the box chosen last. Returns how many are left; adds to `chosen`.
template <class T>
__device__ int choose(const Pool<T>& pool, int size, int enough, const Decay<T>& decay, Box<T>& last, int& chosen,
                      T* final_scores) {
  __shared__ Best<T> warps[2][kMostWarps];
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  for (int step = 1;; ++step) {
    Best<T> best;
    for (int i = t; i < size; i += threads) {
      T score = pool.score[i];
      if (!(score > 0)) continue;
      const Box<T> box = pool.box[i];
      if (touches(last, box) || decay.everywhere) {
        score *= decay.factor(iou(last, box));
        if (!(score > decay.score_threshold)) score = 0;
        pool.score[i] = score;
        if (!(score > 0)) continue;
      }
      best.take(score, unsigned(i));
    }
    best = best_of_block(best, warps[step % 2]);
    if (best.place == kNowhere) return 0;
    last = pool.box[best.place];
    ++chosen;
    if ((int(best.place) & (threads - 1)) == t) {  // its thread
      final_scores[pool.row[best.place]] = best.value;
      pool.score[best.place] = 0;
    }
    if (step % kStepsToCompact == 0 && size > (enough ? enough : threads)) {
      size = compact(pool, size, [&](int i) { return pool.read(i); });
      if (size <= enough) return size;
    }
  }
}

// One class: rows order[0], ..., order[n - 1].
template <class T>
__device__ int choose_of_class(const Detections<T>& d, Segment segment, const Decay<T>& decay, int capacity,
                               const Pool<T>& near, const Pool<T>& far, T* final_scores) {
  const auto read = [&](int i) {
    const int64_t p = segment.begin + i, row = d.order ? d.order[p] : p;
    const T score = d.scores[row];
    const Box<T> box = load_box(d.boxes, row);
    return Candidate<T>{box, score > decay.score_threshold && !has_nan(box) ? score : T(0), int32_t(row)};
  };
  int size = segment.end - segment.begin, chosen = 0;
  Box<T> last = no_box<T>();
  if (size <= capacity) {
    size = compact(near, size, read);
  } else {
    const Pool<T> mine(far, segment.begin);
    size = compact(mine, size, read);
    if (size > capacity) size = choose(mine, size, capacity, decay, last, chosen, final_scores);
    if (size == 0) return chosen;
    size = compact(near, size, [&](int i) { return mine.read(i); });
  }
  choose(near, size, 0, decay, last, chosen, final_scores);
  return chosen;
}

// capacity: boxes in shared memory. far_memory: for n boxes, where n is greater. final_scores: 0 but for chosen boxes.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    soft_nms_choose_kernel(Detections<T> d, Decay<T> decay, int capacity, void* far_memory, int64_t n,
                           T* final_scores, int32_t* total) {
  const Pool<T> near(dynamic_shared<char>(), capacity), far(far_memory, n);
  for (int k = int(blockIdx.x); k < *d.classes.count; k += int(gridDim.x)) {
    const int chosen = choose_of_class(d, d.classes.segments[k], decay, capacity, near, far, final_scores);
    if (threadIdx.x == 0) atomicAdd(total, chosen);
  }
}

template <class T>
__global__ void soft_nms_output_kernel(const int64_t* ranked, const T* final_scores, int64_t chosen, int64_t* indices,
                                       T* scores) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < chosen) indices[i] = ranked[i], scores[i] = final_scores[ranked[i]];
}

// ---- shells ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // a class each, or every 1024th

template <class T>
std::tuple<Tensor, Tensor> soft_nms_typed(const Tensor& boxes_any, const Tensor& scores_any,
                                          const std::optional<Tensor>& ids, const SoftNmsSettings& settings) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Stream stream(boxes_any);
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t n = boxes.size(0), capacity = std::min(n, int64_t(kMostShared / Pool<T>::kBytes));
  std::optional<Tensor> order;
  if (ids) order = stable_argsort(*ids, false);
  Tensor segments = empty_on(boxes, {ids ? n : 1, 2}, ScalarType::Int);
  Tensor counts = torch::stable::new_zeros(segments, {2}), final_scores = torch::stable::new_zeros(scores, {n});
  int32_t *count = mutable_data<int32_t>(counts), *total = count + 1;
  const Detections<T> d{data<T>(boxes), data<T>(scores), order ? data<int64_t>(*order) : nullptr,
                        {reinterpret_cast<Segment*>(mutable_data<int32_t>(segments)), count}};
  stream.launch(list_segments_kernel<int64_t>, {ids ? ceil_div(n, kThreads) : std::min(n, int64_t(1))}, kThreads, 0,
                ids ? data<int64_t>(*ids) : nullptr, d.order, n, d.classes);
  const Decay<T> decay{settings.method, round_down<T>(settings.iou_threshold),
                       settings.sigma > 1e-30 ? T(-1 / settings.sigma) : T(-1e30), T(settings.score_threshold),
                       settings.method == SoftNmsMethod::naive && settings.iou_threshold < 0};
  Tensor far = empty_on(boxes, {n > capacity ? n * int64_t(Pool<T>::kBytes) : 0}, ScalarType::Byte);
  stream.launch(soft_nms_choose_kernel<T>, {ids ? std::min(n, kMostBlocks) : std::min(n, int64_t(1))},
                !ids && n > 2048 ? kMostThreads : kThreads, size_t(capacity) * Pool<T>::kBytes, d, decay, int(capacity),
                static_cast<void*>(mutable_data<uint8_t>(far)), n, mutable_data<T>(final_scores), total);
  const Tensor ranked = stable_argsort(final_scores, true);
  const int64_t chosen = read_first<int32_t>(torch::stable::narrow(counts, 0, 1, 1), stream);
  Tensor indices = empty_on(boxes, {chosen}, ScalarType::Long), out = empty_on(boxes, {chosen}, dtype);
  stream.launch(soft_nms_output_kernel<T>, {ceil_div(chosen, kThreads)}, kThreads, 0, data<int64_t>(ranked),
                data<T>(final_scores), chosen, mutable_data<int64_t>(indices), mutable_data<T>(out));
  return {indices, as_contiguous(out, scores_any.scalar_type())};
}

std::tuple<Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                         double iou_threshold, double sigma, double score_threshold,
                                         const std::string& method) {
  const SoftNmsSettings settings{soft_nms_method(method), iou_threshold, sigma, score_threshold};
  check_soft_nms(boxes, scores, idxs, settings);
  const auto run = either_is_double(boxes, scores) ? soft_nms_typed<double> : soft_nms_typed<float>;
  return run(boxes, scores, as_contiguous(idxs, ScalarType::Long), settings);
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("soft_nms", TORCH_BOX(&fastcv::cuda::soft_nms_cuda)); }
