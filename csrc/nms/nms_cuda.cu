// Non-maximum suppression on the device from end to end: nms, batched_nms and nms_padded.
//
// Boxes are sorted by score (and class) into rows of segments: one segment for each class of each image. A segment is
// cut into blocks of 512 boxes, and block after block is resolved:
//     masks    every box of every block, all at once: which better boxes of its own block it overlaps too much, by bits
//     resolve  round r: block r of every segment. A box is removed when one of those is kept, and kept when all of them
//              are removed; this is asked for all boxes at once until nothing changes, as often as the longest chain of
//              boxes each of which hangs on the one before, mostly a few times
//     sweep    round r: the boxes of later blocks are compared with those of block r that were kept
// So boxes are compared with kept ones only, memory grows with the number of boxes (94 bytes for each in float32, and
// what sorting takes: 28 MB for 300,000) and nothing is copied to the host: the number of rounds follows from the
// length of a row. batched_nms, whose segments may be much shorter than the row of all boxes, reads the length of the
// longest.
//
// Operations: N^2 / 2 comparisons at most, about 15 instructions each, and 256 N for the masks. Floor for 100,000 boxes
// of which a tenth is kept: 1e9 comparisons, 0.5 ms at 30e12 instructions a second; the launches, 390, take about 1 ms.
//
// The IoU is computed as torchvision computes it; this file is compiled without fused multiply-adds, so that the boxes
// kept are those that the CPU keeps.
#include "../common/cuda_boxes.h"
#include "../common/cuda_segments.h"
#include "nms_tensors.h"

namespace fastcv::cuda {
namespace {

constexpr int kBlock = 512, kWords = kBlock / 32;

// Rows of `length` positions, sorted. Positions of a segment follow each other; with ids a row has one for each id.
template <class T>
struct Sorted {
  const T* boxes;          // [rows / classes, length, 4], by index
  const T* scores;         // [rows, length], by index
  const int64_t* order;    // [rows, length] indices
  const int64_t* ids;      // [rows, length] by index, or null
  int64_t rows, length, classes;
  T score_threshold;
  bool all_scores;  // there is no threshold
  Box<T>* box;      // [rows, length] of each position
  int32_t* start;   // [rows, length] where its segment begins in the row
  uint8_t* removed; // [rows, length]
  uint32_t* masks;  // [rows, length, kWords]
  T threshold;
  bool diou;
};

// Whether the overlap of two boxes is greater than the threshold.
template <class T>
__device__ bool overlaps(const Box<T>& a, const Box<T>& b, T threshold, bool diou) {
  T overlap = iou(a, b);
  if (diou) {
    const T width = (a.x2 > b.x2 ? a.x2 : b.x2) - (a.x1 < b.x1 ? a.x1 : b.x1);
    const T height = (a.y2 > b.y2 ? a.y2 : b.y2) - (a.y1 < b.y1 ? a.y1 : b.y1);
    const T dx = ((a.x1 + a.x2) - (b.x1 + b.x2)) * T(0.5), dy = ((a.y1 + a.y2) - (b.y1 + b.y2)) * T(0.5);
    overlap = overlap - (dx * dx + dy * dy) / (width * width + height * height);
  }
  return overlap > threshold;
}

// Each position's box, segment, and whether it takes no part: what holds a NaN or has too low a score.
template <class T>
__global__ void nms_gather_kernel(Sorted<T> s, int32_t* longest) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= s.rows * s.length) return;
  const int64_t row = i / s.length, index = s.order[i];
  const T score = s.scores[row * s.length + index];
  const Box<T> box = load_box(s.boxes, row / s.classes * s.length + index);
  s.box[i] = box;
  s.removed[i] = score != score || has_nan(box) || !(s.all_scores || score > s.score_threshold);
  const int64_t offset = row * s.length, p = i - offset;
  const int64_t first = s.ids ? segment_begin(s.ids + offset, s.order + offset, p) : 0;
  s.start[i] = int32_t(first);
  if (longest) atomicMax(longest, int32_t(p - first + 1));
}

// Bit k of a position's masks: it overlaps position k of its block, which is better.
template <class T>
__global__ void nms_masks_kernel(Sorted<T> s) {
  __shared__ Box<T> near[2 * kBlock];  // this tile's boxes, and those before
  const int64_t row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z, tile = int64_t(blockIdx.x) * kBlock;
  if (row >= s.rows) return;
  const int t = int(threadIdx.x);
  const Box<T>* box = s.box + row * s.length;
  for (int half = 0; half < 2; ++half)
    if (const int64_t p = tile + (half - 1) * kBlock + t; p >= 0 && p < s.length) near[half * kBlock + t] = box[p];
  __syncthreads();
  const int64_t p = tile + t;
  if (p >= s.length) return;
  const int64_t start = s.start[row * s.length + p], base = start + (p - start) / kBlock * kBlock;
  const int before = int(p - base);
  const Box<T> mine = near[kBlock + t];
  uint32_t* masks = s.masks + (row * s.length + p) * kWords;
  for (int w = 0; w < kWords; ++w) {
    uint32_t word = 0;
    for (int k = w * 32; k < w * 32 + 32 && k < before; ++k)
      if (overlaps(near[kBlock + t - before + k], mine, s.threshold, s.diou)) word |= 1u << (k % 32);
    masks[w] = word;
  }
}

// Block `round` of each segment: those that begin in one tile together. Kept boxes and open ones are bits of the
// positions of the tile and the next, of which a thread reads those of its own block.
template <class T>
__global__ void __launch_bounds__(2 * kBlock) nms_resolve_kernel(Sorted<T> s, int64_t round) {
  __shared__ uint32_t kept[2 * kWords + 1], open[2 * kWords + 1];
  const int64_t row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z;
  if (row >= s.rows) return;
  const int t = int(threadIdx.x), warp = t / kWarp;
  const int64_t tile = (s.ids ? int64_t(blockIdx.x) : round) * kBlock, p = tile + t, at = row * s.length + p;
  const int64_t base = p < s.length ? s.start[at] + round * kBlock : -1, offset = base - tile;
  const bool here = p < s.length && offset >= 0 && offset < kBlock && p >= base && p < base + kBlock;
  const int first = here ? int(offset) / 32 : 0, shift = here ? int(offset) % 32 : 0;
  uint32_t mask[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) mask[w] = here ? s.masks[at * kWords + w] : 0;
  bool is_open = here && !s.removed[at], is_kept = false;
  if (t == 0) kept[2 * kWords] = open[2 * kWords] = 0;
  for (;;) {
    const uint32_t kept_word = __ballot_sync(kAllLanes, is_kept), open_word = __ballot_sync(kAllLanes, is_open);
    if (t % kWarp == 0) kept[warp] = kept_word, open[warp] = open_word;
    if (!__syncthreads_or(is_open)) break;
    if (is_open) {
      uint32_t better_kept = 0, better_open = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        better_kept |= mask[w] & __funnelshift_r(kept[first + w], kept[first + w + 1], shift);
        better_open |= mask[w] & __funnelshift_r(open[first + w], open[first + w + 1], shift);
      }
      if (better_kept || !better_open) is_open = false, is_kept = !better_kept;
    }
    __syncthreads();
  }
  if (here) s.removed[at] = !is_kept;
}

// Positions of a tile that belong to a later block of a segment than `round`: they are all of the segment of the tile's
// first position, as others begin in the tile.
template <class T>
__global__ void __launch_bounds__(kBlock) nms_sweep_kernel(Sorted<T> s, int64_t round) {
  __shared__ Box<T> kept[kBlock];
  __shared__ int count[kWords];
  const int64_t row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z;
  if (row >= s.rows) return;
  const int64_t offset = row * s.length, tile = (int64_t(blockIdx.x) + round + 1) * kBlock, p = tile + threadIdx.x;
  if (tile >= s.length) return;
  const int64_t start = s.start[offset + tile], base = start + round * kBlock;
  if (base + kBlock > tile + kBlock - 1) return;
  const int t = int(threadIdx.x), warp = t / kWarp, lane = t % kWarp;
  const bool keeps = start + round * kBlock + t < s.length && !s.removed[offset + base + t];
  const uint32_t word = __ballot_sync(kAllLanes, keeps);
  if (lane == 0) count[warp] = __popc(word);
  __syncthreads();
  int before = __popc(word & ((1u << lane) - 1)), all = 0;
  for (int w = 0; w < kWords; ++w) before += w < warp ? count[w] : 0, all += count[w];
  if (keeps) kept[before] = s.box[offset + base + t];
  __syncthreads();
  if (p >= s.length || p < base + kBlock || s.start[offset + p] != start || s.removed[offset + p]) return;
  const Box<T> mine = s.box[offset + p];
  for (int k = 0; k < all; ++k)
    if (overlaps(kept[k], mine, s.threshold, s.diou)) {
      s.removed[offset + p] = 1;
      return;
    }
}

// Whether an index was kept: [rows, length].
template <class T>
__global__ void nms_scatter_kernel(Sorted<T> s, uint8_t* keep) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < s.rows * s.length) keep[i / s.length * s.length + s.order[i]] = !s.removed[i];
}

__global__ void nms_mask_kernel(const uint8_t* keep, const int64_t* order, bool* mask, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) mask[i] = keep[order[i]];
}

// The first candidates of an image that were kept, in the order of their scores; a block of threads for each image.
__global__ void __launch_bounds__(kBlock)
    nms_select_kernel(const uint8_t* keep, const int64_t* order, const int64_t* ids, int64_t classes, int64_t length,
                      PaddedOutput out) {
  __shared__ int count[kWords];
  const int64_t image = blockIdx.x, candidates = classes * length;
  const int t = int(threadIdx.x), warp = t / kWarp, lane = t % kWarp;
  int64_t found = 0;
  for (int64_t tile = 0; tile < candidates && found < out.limit; tile += kBlock) {
    const int64_t p = tile + t, candidate = p < candidates ? order[image * candidates + p] : 0;
    const bool keeps = p < candidates && keep[image * candidates + candidate];
    const uint32_t word = __ballot_sync(kAllLanes, keeps);
    if (lane == 0) count[warp] = __popc(word);
    __syncthreads();
    int before = __popc(word & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kWords; ++w) before += w < warp ? count[w] : 0, all += count[w];
    if (const int64_t k = found + before; keeps && k < out.limit) {
      out.indices[image * out.limit + k] = candidate % length;
      out.labels[image * out.limit + k] = ids ? ids[image * length + candidate] : candidate / length;
    }
    found += all;
    __syncthreads();
  }
  if (found > out.limit) found = out.limit;
  if (t == 0) out.counts[image] = found;
  for (int64_t k = found + t; k < out.limit; k += kBlock)
    out.indices[image * out.limit + k] = out.labels[image * out.limit + k] = -1;
}

// ---- shells ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// Of rows of scores: [rows, length] flags by index, 1 where kept. longest: of all segments, null where it is `length`.
template <class T>
Tensor suppress(const Stream& stream, const Tensor& boxes, const Tensor& scores, const Tensor& order,
                const std::optional<Tensor>& ids, int64_t classes, Criterion criterion, double score_threshold,
                bool reads_longest) {
  const int64_t rows = scores.size(0), length = scores.size(1), n = rows * length;
  STD_TORCH_CHECK(length < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 a row, got ", length);
  const auto bytes = [&](int64_t size) { return empty_on(boxes, {size}, ScalarType::Byte); };
  Tensor box = empty_on(boxes, {n, 4}, boxes.scalar_type()), start = empty_on(boxes, {n}, ScalarType::Int);
  Tensor removed = bytes(n), masks = empty_on(boxes, {n, kWords}, ScalarType::Int), keep = bytes(n);
  const Sorted<T> s{data<T>(boxes),
                    data<T>(scores),
                    data<int64_t>(order),
                    ids ? data<int64_t>(*ids) : nullptr,
                    rows,
                    length,
                    classes,
                    T(score_threshold),
                    score_threshold == kNoThreshold,
                    reinterpret_cast<Box<T>*>(mutable_data<T>(box)),
                    mutable_data<int32_t>(start),
                    mutable_data<uint8_t>(removed),
                    reinterpret_cast<uint32_t*>(mutable_data<int32_t>(masks)),
                    round_down<T>(criterion.iou_threshold),
                    criterion.diou};
  Tensor longest = torch::stable::new_zeros(start, {1});
  stream.launch(nms_gather_kernel<T>, {ceil_div(n, kThreads)}, kThreads, 0, s,
                reads_longest ? mutable_data<int32_t>(longest) : nullptr);
  int64_t rounds = ceil_div(length, kBlock);
  if (reads_longest && rounds > 1) rounds = ceil_div(read_first<int32_t>(longest, stream), kBlock);
  const int64_t tiles = ceil_div(length, kBlock), high = std::min<int64_t>(rows, 32768);
  const int64_t deep = high ? ceil_div(rows, high) : 0;
  stream.launch(nms_masks_kernel<T>, {tiles, high, deep}, kBlock, 0, s);
  for (int64_t round = 0; round < rounds; ++round) {
    stream.launch(nms_resolve_kernel<T>, {ids ? tiles : 1, high, deep}, 2 * kBlock, 0, s, round);
    stream.launch(nms_sweep_kernel<T>, {tiles - round - 1, high, deep}, kBlock, 0, s, round);
  }
  stream.launch(nms_scatter_kernel<T>, {ceil_div(n, kThreads)}, kThreads, 0, s, mutable_data<uint8_t>(keep));
  return keep;
}

template <class T>
Tensor nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const std::optional<Tensor>& ids,
                 Criterion criterion) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Stream stream(boxes_any);
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t n = boxes.size(0);
  if (n == 0) return empty_on(boxes, {0}, ScalarType::Long);
  const auto row = [&](const Tensor& x) { return torch::stable::view(x, {1, n}); };
  const Tensor order = stable_argsort(row(scores), true);
  std::optional<Tensor> id_row;
  if (ids) id_row = row(*ids);
  const Tensor keep = suppress<T>(stream, boxes, row(scores), ids ? grouped(order, *id_row) : order, id_row, 1,
                                  criterion, kNoThreshold, ids.has_value());
  Tensor mask = empty_on(boxes, {1, n}, ScalarType::Bool);
  stream.launch(nms_mask_kernel, {ceil_div(n, kThreads)}, kThreads, 0, data<uint8_t>(keep), data<int64_t>(order),
                mutable_data<bool>(mask), n);
  return masked_select(order, mask);
}

Tensor nms_any(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, Criterion criterion) {
  check_nms(boxes, scores, idxs);
  const auto run = either_is_double(boxes, scores) ? nms_typed<double> : nms_typed<float>;
  return run(boxes, scores, as_contiguous(idxs, ScalarType::Long), criterion);
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, double iou_threshold, bool diou) {
  return nms_any(boxes, scores, std::nullopt, {iou_threshold, diou});
}

Tensor batched_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold,
                        bool diou) {
  return nms_any(boxes, scores, idxs, {iou_threshold, diou});
}

template <class T>
void nms_padded_typed(const Tensor& boxes_any, const Tensor& scores_any, const std::optional<Tensor>& ids,
                      Criterion criterion, double score_threshold, const PaddedOutput& out) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Stream stream(boxes_any);
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t images = boxes.size(0), n = boxes.size(1), classes = scores.dim() == 3 ? scores.size(1) : 1;
  const Tensor rows = torch::stable::view(scores, {images * classes, n});
  Tensor order = stable_argsort(rows, true);
  const Tensor ranked =
      classes == 1 ? order : stable_argsort(torch::stable::view(scores, {images, classes * n}), true);
  if (ids) order = grouped(order, *ids);
  const Tensor keep = suppress<T>(stream, boxes, rows, order, ids, classes, criterion, score_threshold, false);
  stream.launch(nms_select_kernel, {images}, kBlock, 0, data<uint8_t>(keep), data<int64_t>(ranked),
                ids ? data<int64_t>(*ids) : nullptr, classes, n, out);
}

std::tuple<Tensor, Tensor, Tensor> nms_padded_cuda(const Tensor& boxes, const Tensor& scores,
                                                   const std::optional<Tensor>& idxs, double iou_threshold,
                                                   int64_t max_output, double score_threshold, bool diou) {
  check_nms_padded(boxes, scores, idxs, max_output);
  const int64_t images = boxes.size(0);
  Tensor indices = empty_on(boxes, {images, max_output}, ScalarType::Long);
  Tensor labels = empty_on(boxes, {images, max_output}, ScalarType::Long);
  Tensor counts = empty_on(boxes, {images}, ScalarType::Long);
  const PaddedOutput out{mutable_data<int64_t>(indices), mutable_data<int64_t>(labels), mutable_data<int64_t>(counts),
                         max_output};
  const auto run = either_is_double(boxes, scores) ? nms_padded_typed<double> : nms_padded_typed<float>;
  run(boxes, scores, as_contiguous(idxs, ScalarType::Long), {iou_threshold, diou}, score_threshold, out);
  return {indices, labels, counts};
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("nms", TORCH_BOX(&fastcv::cuda::nms_cuda));
  m.impl("batched_nms", TORCH_BOX(&fastcv::cuda::batched_nms_cuda));
  m.impl("nms_padded", TORCH_BOX(&fastcv::cuda::nms_padded_cuda));
}
