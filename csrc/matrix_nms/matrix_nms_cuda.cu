// Matrix NMS on the device (matrix_nms.h has the formulas): two passes over all pairs of a box and a better one.
//
// The boxes of each image are sorted by score and class into a row of segments, so that better boxes of the class of a
// position are those between the begin of its segment and itself. A block of threads takes 128 positions, one a thread,
// and every so many-th tile of 128 boxes before them, which it reads through shared memory; blocks that share positions
// meet in an atomic maximum or minimum of bits, whose result does not depend on their order. Between the passes nothing
// is kept but a number for each box.
//
// Bytes: 28 a box (52 in float64) and what sorting takes, never a matrix. Operations: N^2 / 2 pairs a pass, about 10
// instructions where they do not touch, 50 where they do. Floor for 10,000 boxes of one class, of which few touch: 1e9
// instructions, 0.03 ms at 30e12 a second; for 1000 boxes the launches are the floor.
//
// This file is compiled without fused multiply-adds: the IoU of a copy is 1, so that it has no say.
#include "../common/cuda_best.h"
#include "../common/cuda_boxes.h"
#include "../common/cuda_segments.h"
#include "matrix_nms_tensors.h"

namespace fastcv::cuda {
namespace {

constexpr int kTile = 128;

// Rows of `length` positions, sorted; tiles do not reach over the end of a row.
template <class T>
struct Sorted {
  const T* boxes;         // [rows, length, 4], by index
  const T* scores;        // [rows, length], by index
  const int64_t* order;   // [rows, length] indices
  const int64_t* ids;     // [rows, length] by index, or null
  int64_t rows, length, tiles;
  Box<T>* box;            // [rows, length] of each position; NaN: takes no part
  int32_t* start;         // [rows, length] where its segment begins in the row
  Bits<T>* overlap;       // [rows, length] the greatest IoU with a better box
  Bits<T>* decay;         // [rows, length]
};

template <class T>
__global__ void matrix_nms_gather_kernel(Sorted<T> s) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= s.rows * s.length) return;
  const int64_t offset = i / s.length * s.length, at = offset + s.order[i];
  const Box<T> box = load_box(s.boxes, at);
  const T score = s.scores[at];
  s.box[i] = score != score || has_nan(box) ? no_box<T>() : box;
  s.start[i] = s.ids ? int32_t(segment_begin(s.ids + offset, s.order + offset, i - offset)) : 0;
  s.overlap[i] = to_bits(T(0)), s.decay[i] = to_bits(T(1));
}

// Calls visit(iou, overlap of the better box) for better boxes of this thread's position that overlap its own; false
// where there is no such position. with_overlap: that the second is read.
template <bool with_overlap, class T, class Visit>
__device__ bool each_better(const Sorted<T>& s, int64_t& position, const Visit& visit) {
  __shared__ Box<T> near[kTile];
  __shared__ T near_overlap[kTile];
  // The last tiles, which have the most to do, first.
  const int64_t block = gridDim.x - 1 - int64_t(blockIdx.x), offset = block / s.tiles * s.length;
  const int64_t tile = block % s.tiles * kTile, p = tile + threadIdx.x;
  const int t = int(threadIdx.x);
  position = offset + p;
  const bool here = p < s.length;
  const Box<T> mine = here ? s.box[position] : no_box<T>();
  const int64_t start = here ? s.start[position] : 0, first = s.start[offset + tile] / kTile * kTile;
  for (int64_t other = first + int64_t(blockIdx.y) * kTile; other <= tile; other += int64_t(gridDim.y) * kTile) {
    __syncthreads();
    const bool exists = other + t < s.length;
    near[t] = exists ? s.box[offset + other + t] : no_box<T>();
    if (with_overlap) near_overlap[t] = exists ? from_bits<T>(s.overlap[offset + other + t]) : T(0);
    __syncthreads();
    for (int k = 0; k < kTile; ++k) {
      if (!touches(near[k], mine) || other + k < start || other + k >= p) continue;
      const T common = intersection(near[k], mine);
      if (common > 0) visit(common / (area(near[k]) + area(mine) - common), with_overlap ? near_overlap[k] : T(0));
    }
  }
  return here;
}

template <class T>
__global__ void __launch_bounds__(kTile) matrix_nms_overlap_kernel(Sorted<T> s) {
  T most = 0;
  int64_t position;
  const auto visit = [&](T o, T) { most = o > most ? o : most; };
  if (each_better<false>(s, position, visit) && most > 0) atomicMax(s.overlap + position, to_bits(most));
}

template <class T>
__global__ void __launch_bounds__(kTile) matrix_nms_decay_kernel(Sorted<T> s, bool linear, T minus_sigma) {
  T decay = 1;
  int64_t position;
  bool here;
  if (linear) {
    here = each_better<true>(s, position, [&](T o, T overlap) {
      const T ratio = (1 - o) / (1 - overlap);  // a divisor of 0 makes infinity or NaN: no say
      decay = ratio < decay ? ratio : decay;
    });
  } else {
    T most = 0;
    here = each_better<true>(s, position, [&](T o, T overlap) {
      const T excess = o * o - overlap * overlap;
      most = excess > most ? excess : most;
    });
    decay = std::exp(most * minus_sigma);
  }
  if (here && decay < 1) atomicMin(s.decay + position, to_bits(not_negative(decay)));
}

template <class T>
__global__ void matrix_nms_scatter_kernel(Sorted<T> s, T* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= s.rows * s.length) return;
  const int64_t at = i / s.length * s.length + s.order[i];
  const T decay = has_nan(s.box[i]) ? T(0) : from_bits<T>(s.decay[i]);
  out[at] = decay > 0 ? s.scores[at] * decay : T(0);  // no product with 0: the score may be infinite
}

// ---- shells ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 4096;  // enough for any device: about 30 for each multiprocessor of an H200

template <class T>
Tensor matrix_nms_typed(const Tensor& boxes_any, const Tensor& scores_any, const std::optional<Tensor>& ids,
                        double sigma, bool linear) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  const ScalarType dtype = kDouble ? ScalarType::Double : ScalarType::Float;
  const ScalarType bits = kDouble ? ScalarType::Long : ScalarType::Int;
  const Stream stream(boxes_any);
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t rows = boxes.size(0), length = boxes.size(1), n = rows * length;
  Tensor out = empty_on(boxes, {rows, length}, dtype);
  if (n == 0) return as_contiguous(out, scores_any.scalar_type());
  Tensor order = stable_argsort(scores, true);
  if (ids) order = grouped(order, *ids);
  Tensor box = empty_on(boxes, {n, 4}, dtype), start = empty_on(boxes, {n}, ScalarType::Int);
  Tensor overlap = empty_on(boxes, {n}, bits), decay = empty_on(boxes, {n}, bits);
  const Sorted<T> s{data<T>(boxes),
                    data<T>(scores),
                    data<int64_t>(order),
                    ids ? data<int64_t>(*ids) : nullptr,
                    rows,
                    length,
                    ceil_div(length, kTile),
                    static_cast<Box<T>*>(box.mutable_data_ptr()),
                    mutable_data<int32_t>(start),
                    static_cast<Bits<T>*>(overlap.mutable_data_ptr()),
                    static_cast<Bits<T>*>(decay.mutable_data_ptr())};
  const int64_t each = ceil_div(n, kThreads), tiles = rows * s.tiles;
  const int64_t shares = std::clamp<int64_t>(kBlocks / tiles, 1, s.tiles);
  stream.launch(matrix_nms_gather_kernel<T>, {each}, kThreads, 0, s);
  stream.launch(matrix_nms_overlap_kernel<T>, {tiles, shares}, kTile, 0, s);
  stream.launch(matrix_nms_decay_kernel<T>, {tiles, shares}, kTile, 0, s, linear, T(sigma < 1e30 ? -sigma : -1e30));
  stream.launch(matrix_nms_scatter_kernel<T>, {each}, kThreads, 0, s, mutable_data<T>(out));
  return as_contiguous(out, scores_any.scalar_type());
}

Tensor matrix_nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double sigma,
                       bool linear) {
  check_matrix_nms(boxes, scores, idxs);
  const auto run = either_is_double(boxes, scores) ? matrix_nms_typed<double> : matrix_nms_typed<float>;
  return run(boxes, scores, as_contiguous(idxs, ScalarType::Long), sigma, linear);
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("matrix_nms", TORCH_BOX(&fastcv::cuda::matrix_nms_cuda)); }
