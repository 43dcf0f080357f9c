// Greedy suppression on the device, of any kind of boxes: what nms and its like, and nms_rotated, share.
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
// A criterion C has the number type of scores (Number), what is kept of a box (Box), how it is loaded from a row of
// numbers (load; has_nan of it: takes no part), and overlaps(better, box). Files that include this are compiled without
// fused multiply-adds, so that the boxes kept are those that the CPU keeps.
#pragma once

#include "../common/cuda_boxes.h"
#include "../common/cuda_places.h"
#include "../common/cuda_segments.h"
#include "nms_tensors.h"

namespace fastcv::cuda {

constexpr int kBlock = 512, kWords = kBlock / 32;

// Rows of `length` positions, sorted. Positions of a segment follow each other; with ids a row has one for each id.
template <class C>
struct Sorted {
  using T = typename C::Number;
  using Box = typename C::Box;
  const T* boxes;          // [rows / classes, length, ...], by index
  const T* scores;         // [rows, length], by index
  const int64_t* order;    // [rows, length] indices
  const int64_t* ids;      // [rows, length] by index, or null
  int64_t rows, length, classes;
  T score_threshold;
  bool all_scores;  // there is no threshold
  Box* box;         // [rows, length] of each position
  int32_t* start;   // [rows, length] where its segment begins in the row
  uint8_t* removed; // [rows, length]
  uint32_t* masks;  // [rows, length, kWords]
  C criterion;
};

// Each position's box, segment, and whether it takes no part: what holds a NaN or has too low a score.
template <class C>
__global__ void nms_gather_kernel(Sorted<C> s, int32_t* longest) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= s.rows * s.length) return;
  const int64_t row = i / s.length, index = s.order[i];
  const auto score = s.scores[row * s.length + index];
  const auto box = s.criterion.load(s.boxes, row / s.classes * s.length + index);
  s.box[i] = box;
  s.removed[i] = score != score || has_nan(box) || !(s.all_scores || score > s.score_threshold);
  const int64_t offset = row * s.length, p = i - offset;
  const int64_t first = s.ids ? segment_begin(s.ids + offset, s.order + offset, p) : 0;
  s.start[i] = int32_t(first);
  if (longest) atomicMax(longest, int32_t(p - first + 1));
}

// Bit k of a position's masks: it overlaps position k of its block, which is better.
template <class C>
__global__ void nms_masks_kernel(Sorted<C> s) {
  __shared__ typename C::Box near[2 * kBlock];  // this tile's boxes, and those before
  const int64_t row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z, tile = int64_t(blockIdx.x) * kBlock;
  if (row >= s.rows) return;
  const int t = int(threadIdx.x);
  const typename C::Box* box = s.box + row * s.length;
  for (int half = 0; half < 2; ++half)
    if (const int64_t p = tile + (half - 1) * kBlock + t; p >= 0 && p < s.length) near[half * kBlock + t] = box[p];
  __syncthreads();
  const int64_t p = tile + t;
  if (p >= s.length) return;
  const int64_t start = s.start[row * s.length + p], base = start + (p - start) / kBlock * kBlock;
  const int before = int(p - base);
  const typename C::Box mine = near[kBlock + t];
  uint32_t* masks = s.masks + (row * s.length + p) * kWords;
  for (int w = 0; w < kWords; ++w) {
    uint32_t word = 0;
    for (int k = w * 32; k < w * 32 + 32 && k < before; ++k)
      if (s.criterion.overlaps(near[kBlock + t - before + k], mine)) word |= 1u << (k % 32);
    masks[w] = word;
  }
}

// Block `round` of each segment: those that begin in one tile together. Kept boxes and open ones are bits of the
// positions of the tile and the next, of which a thread reads those of its own block.
template <class C>
__global__ void __launch_bounds__(2 * kBlock) nms_resolve_kernel(Sorted<C> s, int64_t round) {
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
template <class C>
__global__ void __launch_bounds__(kBlock) nms_sweep_kernel(Sorted<C> s, int64_t round) {
  __shared__ typename C::Box kept[kBlock];
  __shared__ int count[kWords];
  const int64_t row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z;
  if (row >= s.rows) return;
  const int64_t offset = row * s.length, tile = (int64_t(blockIdx.x) + round + 1) * kBlock, p = tile + threadIdx.x;
  if (tile >= s.length) return;
  const int64_t start = s.start[offset + tile], base = start + round * kBlock;
  if (base + kBlock > tile + kBlock - 1) return;
  const int t = int(threadIdx.x);
  const bool keeps = start + round * kBlock + t < s.length && !s.removed[offset + base + t];
  const Place place = place_in_block(keeps, count, kWords);
  if (keeps) kept[place.before] = s.box[offset + base + t];
  __syncthreads();
  if (p >= s.length || p < base + kBlock || s.start[offset + p] != start || s.removed[offset + p]) return;
  const typename C::Box mine = s.box[offset + p];
  for (int k = 0; k < place.all; ++k)
    if (s.criterion.overlaps(kept[k], mine)) {
      s.removed[offset + p] = 1;
      return;
    }
}

// Whether an index was kept: [rows, length].
template <class C>
__global__ void nms_scatter_kernel(Sorted<C> s, uint8_t* keep) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < s.rows * s.length) keep[i / s.length * s.length + s.order[i]] = !s.removed[i];
}

static __global__ void nms_mask_kernel(const uint8_t* keep, const int64_t* order, bool* mask, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) mask[i] = keep[order[i]];
}

// ---- on the host ----------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// Of rows of scores: [rows, length] flags by index, 1 where kept. longest: of all segments, null where it is `length`.
template <class C>
Tensor suppress(const Stream& stream, const Tensor& boxes, const Tensor& scores, const Tensor& order,
                const std::optional<Tensor>& ids, int64_t classes, const C& criterion, double score_threshold,
                bool reads_longest) {
  using T = typename C::Number;
  using Box = typename C::Box;
  const int64_t rows = scores.size(0), length = scores.size(1), n = rows * length;
  STD_TORCH_CHECK(length < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 a row, got ", length);
  const auto bytes = [&](int64_t size) { return empty_on(boxes, {size}, ScalarType::Byte); };
  Tensor box = bytes(n * int64_t(sizeof(Box))), start = empty_on(boxes, {n}, ScalarType::Int);
  Tensor removed = bytes(n), masks = empty_on(boxes, {n, kWords}, ScalarType::Int), keep = bytes(n);
  const Sorted<C> s{data<T>(boxes),
                    data<T>(scores),
                    data<int64_t>(order),
                    ids ? data<int64_t>(*ids) : nullptr,
                    rows,
                    length,
                    classes,
                    T(score_threshold),
                    score_threshold == kNoThreshold,
                    reinterpret_cast<Box*>(mutable_data<uint8_t>(box)),
                    mutable_data<int32_t>(start),
                    mutable_data<uint8_t>(removed),
                    reinterpret_cast<uint32_t*>(mutable_data<int32_t>(masks)),
                    criterion};
  Tensor longest = torch::stable::new_zeros(start, {1});
  stream.launch(nms_gather_kernel<C>, {ceil_div(n, kThreads)}, kThreads, 0, s,
                reads_longest ? mutable_data<int32_t>(longest) : nullptr);
  int64_t rounds = ceil_div(length, kBlock);
  if (reads_longest && rounds > 1) rounds = ceil_div(read_first<int32_t>(longest, stream), kBlock);
  const int64_t tiles = ceil_div(length, kBlock), high = std::min<int64_t>(rows, 32768);
  const int64_t deep = high ? ceil_div(rows, high) : 0;
  stream.launch(nms_masks_kernel<C>, {tiles, high, deep}, kBlock, 0, s);
  for (int64_t round = 0; round < rounds; ++round) {
    stream.launch(nms_resolve_kernel<C>, {ids ? tiles : 1, high, deep}, 2 * kBlock, 0, s, round);
    stream.launch(nms_sweep_kernel<C>, {tiles - round - 1, high, deep}, kBlock, 0, s, round);
  }
  stream.launch(nms_scatter_kernel<C>, {ceil_div(n, kThreads)}, kThreads, 0, s, mutable_data<uint8_t>(keep));
  return keep;
}

// Indices of the boxes kept, best first; ids: [N] or none.
template <class C>
Tensor kept_indices(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& ids, const C& criterion) {
  const Stream stream(boxes);
  const int64_t n = boxes.size(0);
  if (n == 0) return empty_on(boxes, {0}, ScalarType::Long);
  const auto row = [&](const Tensor& x) { return torch::stable::view(x, {1, n}); };
  const Tensor order = stable_argsort(row(scores), true);
  std::optional<Tensor> id_row;
  if (ids) id_row = row(*ids);
  const Tensor keep = suppress(stream, boxes, row(scores), ids ? grouped(order, *id_row) : order, id_row, 1, criterion,
                               kNoThreshold, ids.has_value());
  Tensor mask = empty_on(boxes, {1, n}, ScalarType::Bool);
  stream.launch(nms_mask_kernel, {ceil_div(n, kThreads)}, kThreads, 0, data<uint8_t>(keep), data<int64_t>(order),
                mutable_data<bool>(mask), n);
  return masked_select(order, mask);
}

}  // namespace fastcv::cuda
