// The gradient of a Gram matrix: S F with the symmetric S = scale * (grad + grad^T), 2 C^2 operations a position.
//
// Contiguous features: rows are channels of the result, S broadcast where it lies, [C][C]; columns are positions,
// kWidth of them, packed [channel][position] (64 KB for 256 channels). A task packs a few panels, and each row tile of
// S (6 KB) meets them all. Channels-last: rows are positions, read where they lie (half types: converted first);
// columns are output channels, S laid out in panels [panel][channel][kWidth], each read from the second-level cache by
// all positions of a task. Bound by arithmetic: 8.6 G multiply-adds for 256 x 65536, 75 ms on one core of 115 GFLOP/s.
#include "gram_matrix.h"

#include "../common/channel_block.h"
#include "gram_matrix_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;
// Of a tile.
constexpr int kVectors = kVectorBytes == 64 ? 4 : 2, kRows = kVectorBytes == 64 ? 6 : 4;
template <class T>  // of a panel
constexpr int64_t kWidth = kVectors * kLanes<Acc<T>>;

constexpr int64_t kTaskBytes = 192 * 1024;  // of features
constexpr int64_t kMostPanels = 4;

// Positions of a task.
template <class T>
int64_t task_positions(const GramBackward<T>& task) {
  const int64_t panels = kTaskBytes / (kWidth<T> * int64_t(sizeof(Acc<T>)) * max_of(1, task.features.channels));
  return max_of(1, min_of(kMostPanels, panels)) * kWidth<T>;
}

// Rows of the result, at row_step, by kVectors vectors of columns, `width` of which exist.
template <int R, class T, class A>
void product_tile(const A* rows, int64_t row_step, const A* panel, int64_t depth, T* to, int64_t to_step,
                  int64_t width) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<A>{};
  multiply_add(sum, rows, row_step, 1, panel, L, kVectors * L, depth);
  if (width >= kVectors * L) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) store(to + r * to_step + v * L, sum[r][v]);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        if (v * L < width) store_some(to + r * to_step + v * L, sum[r][v], width - v * L);
  }
}

template <class T, class A>
void product_rows(int64_t count, const A* rows, int64_t row_step, const A* panel, int64_t depth, T* to, int64_t to_step,
                  int64_t width) {
  for (int64_t r = 0; r < count; r += kRows)
    with_constant<kRows>(int(min_of(kRows, count - r)), [&](auto n) FASTCV_INLINE_LAMBDA {
      product_tile<decltype(n)::value>(rows + r * row_step, row_step, panel, depth, to + r * to_step, to_step, width);
    });
}

// Positions [first, first + count) of all channels of contiguous features.
template <class T>
void contiguous_task(const GramBackward<T>& task, int64_t image, int64_t first, int64_t count, Acc<T>* scratch) {
  const FeatureMap<const T>& map = task.features;
  const int64_t channels = map.channels, size = channels * kWidth<T>;
  constexpr int L = kLanes<Acc<T>>;
  for (int64_t p = 0; p < count; p += kWidth<T>) {
    Acc<T>* const panel = scratch + p / kWidth<T> * size;
    for (int64_t c = 0; c < channels; ++c)
      for (int v = 0; v < kVectors; ++v) {
        const T* from = map.data + image * map.stride_n + c * map.stride_c + first + p + v * L;
        const int64_t n = count - p - v * L;
        store(panel + c * kWidth<T> + v * L, n > 0 ? load_some(from, n) : Vec<Acc<T>>{});
      }
  }
  const Acc<T>* const symmetric = task.symmetric + image * task.symmetric_stride_n;
  T* const output = task.output.data + image * task.output.stride_n + first;
  for (int64_t c = 0; c < channels; c += kRows)
    for (int64_t p = 0; p < count; p += kWidth<T>)
      product_rows(min_of(kRows, channels - c), symmetric + c * channels, channels, scratch + p / kWidth<T> * size,
                   channels, output + c * task.output.stride_c + p, task.output.stride_c, count - p);
}

template <class T>
void channels_last_task(const GramBackward<T>& task, int64_t image, int64_t first, int64_t count, Acc<T>* scratch) {
  const FeatureMap<const T>& map = task.features;
  const int64_t channels = map.channels;
  const T* const features = map.data + image * map.stride_n + first * map.stride_x;
  const Acc<T>* rows;
  int64_t step = map.stride_x;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    rows = features;
  } else {
    constexpr int L = kLanes<Acc<T>>;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < channels; c += L)
        store_some(scratch + p * channels + c, load_some(features + p * step + c, channels - c), channels - c);
    rows = scratch, step = channels;
  }
  T* const output = task.output.data + image * task.output.stride_n + first * task.output.stride_x;
  for (int64_t c = 0; c < channels; c += kWidth<T>)
    product_rows(count, rows, step, task.symmetric + image * task.symmetric_stride_n + c * channels, channels,
                 output + c, task.output.stride_x, channels - c);
}

}  // namespace

template <class A>
int64_t gram_symmetric_size(int64_t channels, bool channels_last) {
  return channels * (channels_last ? ceil_div(channels, kWidth<A>) * kWidth<A> : channels);
}

template <class A>
void gram_symmetrize(const A* grad, int64_t channels, A scale, bool channels_last, A* to, int64_t begin, int64_t end) {
  // Whole lines of both matrices.
  constexpr int64_t kLine = 64 / sizeof(A), kSquare = kWidth<A> < kLine ? kWidth<A> : kLine;
  const int64_t columns = channels_last ? ceil_div(channels, kWidth<A>) * kWidth<A> : channels;
  for (int64_t i0 = begin; i0 < end; i0 += kSquare)
    for (int64_t j0 = 0; j0 < columns; j0 += kSquare) {
      const int64_t step = channels_last ? kWidth<A> : channels;
      A* const square = channels_last ? to + j0 / kWidth<A> * kWidth<A> * channels + j0 % kWidth<A> : to + j0;
      for (int64_t i = i0; i < min_of(end, i0 + kSquare); ++i)
        for (int64_t j = j0; j < min_of(columns, j0 + kSquare); ++j)
          square[i * step + j - j0] = j < channels ? scale * (grad[i * channels + j] + grad[j * channels + i]) : A(0);
    }
}

template <class T>
int64_t gram_backward_tasks(const GramBackward<T>& task) {
  return task.features.images * ceil_div(task.features.width, task_positions(task));
}

template <class T>
int64_t gram_backward_scratch(const GramBackward<T>& task) {
  return task_positions(task) * task.features.channels;
}

template <class T>
void gram_backward(const GramBackward<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t positions = task_positions(task), parts = ceil_div(task.features.width, positions);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % parts * positions, count = min_of(positions, task.features.width - first);
    if (task.channels_last)
      channels_last_task(task, t / parts, first, count, scratch);
    else
      contiguous_task(task, t / parts, first, count, scratch);
  }
}

#define FASTCV_INSTANTIATE(T)                                              \
  template int64_t gram_backward_tasks<T>(const GramBackward<T>&);         \
  template int64_t gram_backward_scratch<T>(const GramBackward<T>&);       \
  template void gram_backward<T>(const GramBackward<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)
template int64_t gram_symmetric_size<float>(int64_t, bool);
template int64_t gram_symmetric_size<double>(int64_t, bool);
template void gram_symmetrize<float>(const float*, int64_t, float, bool, float*, int64_t, int64_t);
template void gram_symmetrize<double>(const double*, int64_t, double, bool, double*, int64_t, int64_t);

}  // namespace fastcv::FASTCV_ISA
