// The loops of RoI pooling's gradient: each bin's goes to the pixel of its maximum.
//
// Bytes for 1000 regions of 256 channels, 7x7 bins, on a 200x272 map in float32: gradients and positions 100 MB, the
// result 56 MB. 12.5 million additions to scattered places: their time is that of the cache in which the places are.
// So a contiguous gradient is made plane by plane (218 KB, in the second-level cache). A channels-last one is made in
// bands of rows, one for each thread, region after region in spatial order; the places of the next bin are fetched
// while those of one are added (without that 27 ms, on one thread 50). Blocks of channels do worse the smaller they are
// (on one thread 128: 58 ms, 16: 110 ms), in place and in packed tiles alike: gradients and positions then come in
// small pieces. Measured on two threads of a Zen 4: contiguous 16 to 20 ms, channels-last 22 ms; torchvision 171 ms.
#include "roi_pool.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

// Where sums are formed: in the result itself, or in scratch where its type is too coarse.
template <class T>
FASTCV_INLINE Acc<T>* sums_at(T* result, Acc<T>* scratch) {
  if constexpr (sizeof(T) == sizeof(Acc<T>))
    return result;
  else
    return scratch;
}
template <class T>
FASTCV_INLINE void finish(const Acc<T>* sums, int64_t n, T* result) {
  if constexpr (sizeof(T) != sizeof(Acc<T>))
    for (int64_t i = 0; i < n; ++i) from_accumulate(sums[i], result + i);
}

// The next region's gradients are elsewhere: ask for them while this one's are added.
template <class T>
void prefetch_planes(const RoiPoolBackward<T>& task, int64_t row, int64_t first, int64_t channels) {
  const T* grad = task.grad + row * task.grad_stride_roi + first * task.grad_stride_c;
  const int32_t* argmax = task.argmax + row * task.argmax_stride_roi + first * task.argmax_stride_c;
  for (int64_t at = 0; at < channels * task.pooled_height * task.pooled_width; at += 16) {
    __builtin_prefetch(grad + at);
    __builtin_prefetch(argmax + at);
  }
}

}  // namespace

template <class T>
bool roi_pool_backward_planes(const RoiPoolBackward<T>& task, int64_t image, int64_t begin, int64_t end, int64_t first,
                              int64_t last, Acc<T>* scratch) {
  const FeatureMap<T>& map = task.map;
  const int64_t channels = last - first, plane = map.height * map.width;
  T* const result = map.data + image * map.stride_n + first * plane;
  Acc<T>* const sums = sums_at(result, scratch);
  memset(sums, 0, size_t(channels * plane) * sizeof(Acc<T>));
  bool valid = true;
  for (int64_t i = begin; i < end; ++i) {
    const PoolRegion& region = task.regions[i];
    if (i + 1 < end) prefetch_planes(task, task.regions[i + 1].row, first, channels);
    for (int64_t c = 0; c < channels; ++c) {
      const T* grad = task.grad + region.row * task.grad_stride_roi + (first + c) * task.grad_stride_c;
      const int32_t* argmax = task.argmax + region.row * task.argmax_stride_roi + (first + c) * task.argmax_stride_c;
      for (int64_t ph = 0; ph < task.pooled_height; ++ph) {
        const int64_t low = region.rows[ph].begin * map.width, high = region.rows[ph].end * map.width;
        if (low >= high) continue;
        for (int64_t b = ph * task.pooled_width; b < (ph + 1) * task.pooled_width; ++b) {
          const int64_t place = argmax[b * task.argmax_stride_bin];
          if (place >= low && place < high)
            sums[c * plane + place] += to_accumulate(grad[b * task.grad_stride_bin]);
          else
            valid &= place == -1;
        }
      }
    }
  }
  finish(sums, channels * plane, result);
  return valid;
}

template <class T>
bool roi_pool_backward_rows(const RoiPoolBackward<T>& task, int64_t image, int64_t begin, int64_t end,
                            int64_t first_row, int64_t end_row, Acc<T>* scratch) {
  const FeatureMap<T>& map = task.map;
  const int64_t row_size = map.width * map.channels, origin = first_row * map.width;
  T* const result = map.data + image * map.stride_n + first_row * row_size;
  Acc<T>* const sums = sums_at(result, scratch);
  int64_t cleared = first_row;  // rows are cleared just before they are needed: they are still in cache then
  const auto clear_to = [&](int64_t row) {
    if (row <= cleared) return;
    memset(sums + (cleared - first_row) * row_size, 0, size_t((row - cleared) * row_size) * sizeof(Acc<T>));
    cleared = row;
  };
  bool valid = true;
  for (int64_t i = begin; i < end; ++i) {
    const PoolRegion& region = task.regions[i];
    for (int64_t ph = 0; ph < task.pooled_height; ++ph) {
      const PixelRange rows = region.rows[ph];
      const int64_t own_begin = max_of(rows.begin, first_row), own_end = min_of(rows.end, end_row);
      if (own_begin >= own_end) continue;
      clear_to(own_end);
      const int64_t low = own_begin * map.width, high = own_end * map.width;
      for (int64_t b = ph * task.pooled_width; b < (ph + 1) * task.pooled_width; ++b) {
        const T* grad = task.grad + region.row * task.grad_stride_roi + b * task.grad_stride_bin;
        const int32_t* argmax = task.argmax + region.row * task.argmax_stride_roi + b * task.argmax_stride_bin;
        const int32_t* next = argmax + (b + 1 < task.pooled_height * task.pooled_width ? task.argmax_stride_bin : 0);
        for (int64_t c = 0; c < map.channels; ++c) {
          const int64_t place = argmax[c * task.argmax_stride_c];
          __builtin_prefetch(sums + (next[c * task.argmax_stride_c] - origin) * map.channels + c, 1);
          if (place >= low && place < high)
            sums[(place - origin) * map.channels + c] += to_accumulate(grad[c * task.grad_stride_c]);
          else  // nobody's, or another band's
            valid &= place == -1 || (place >= rows.begin * map.width && place < rows.end * map.width);
        }
      }
    }
  }
  clear_to(end_row);
  finish(sums, (end_row - first_row) * row_size, result);
  return valid;
}

#define FASTCV_INSTANTIATE(T)                                                                                       \
  template bool roi_pool_backward_planes<T>(const RoiPoolBackward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                            Acc<T>*);                                                               \
  template bool roi_pool_backward_rows<T>(const RoiPoolBackward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t,   \
                                          Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
