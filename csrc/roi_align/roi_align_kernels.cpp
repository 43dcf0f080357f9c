// The loops of RoIAlign: weighted sums over taps, vectorised over channels.
//
// Bytes for 1000 regions of 256 channels, 7x7 bins, sampling ratio 2, on a 200x272 map in float32: the map 56 MB once,
// the output 50 MB; 16 taps a bin make 0.2 GFMA, so memory bounds it. Regions are visited in spatial order, so that
// neighbours meet in cache.
#include "roi_align.h"

#include "../common/channel_block.h"
#include "sum_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

template <int NV, class T>
FASTCV_INLINE int64_t bin_vectors(const T* features, const FeatureMap<const T>& map, const Tap<Acc<T>>* y,
                                  const Tap<Acc<T>>* y_end, const Tap<Acc<T>>* x, const Tap<Acc<T>>* x_end, int64_t c,
                                  T* out) {
  constexpr int64_t step = NV * kLanes<Acc<T>>;
  for (; c + step <= map.channels; c += step) {
    Vec<Acc<T>> sum[NV];
    sum_taps<NV>(features + c, map.stride_y, map.stride_x, y, y_end, x, x_end, sum);
    for (int v = 0; v < NV; ++v) store(out + c + v * kLanes<Acc<T>>, sum[v]);
  }
  return c;
}

// The last channels, fewer than a vector.
template <class T>
void bin_tail(const T* features, const FeatureMap<const T>& map, const Tap<Acc<T>>* y, const Tap<Acc<T>>* y_end,
              const Tap<Acc<T>>* x, const Tap<Acc<T>>* x_end, int64_t c, T* out) {
  const int n = int(map.channels - c);
  Vec<Acc<T>> sum{};
  for (; y < y_end; ++y)
    for (const Tap<Acc<T>>* tap = x; tap < x_end; ++tap)
      sum = fma(load_first(features + c + y->index * map.stride_y + tap->index * map.stride_x, n),
                broadcast(y->weight * tap->weight), sum);
  store_first(out + c, sum, n);
}

// All bins of a region for one packed block of channels: into `tile` [bins][L], then to the output.
template <class T>
void pool_block(const RoiAlignForward<T>& task, const RoiTaps<Acc<T>>& roi, const Tap<Acc<T>>* taps,
                const Acc<T>* features, int64_t stride_y, int64_t channel, int channels, Acc<T>* tile) {
  constexpr int L = kLanes<Acc<T>>;
  const int32_t *y = roi.begin, *x = roi.begin + task.pooled_height + 1;
  Acc<T>* out = tile;
  for (int64_t ph = 0; ph < task.pooled_height; ++ph)
    for (int64_t pw = 0; pw < task.pooled_width; ++pw, out += L) {
      Vec<Acc<T>> sum[1];
      sum_taps<1>(features, stride_y, L, taps + y[ph], taps + y[ph + 1], taps + x[pw], taps + x[pw + 1], sum);
      store(out, sum[0]);
    }
  const int64_t bins = task.pooled_height * task.pooled_width;
  T* const target = task.output + roi.row * task.stride_roi + channel * task.stride_c;
  if (task.stream) {
    T* const staged = reinterpret_cast<T*>(out);  // behind the tile
    unpack(tile, bins, channels, staged, bins, 1);
    stream_copy(target, staged, channels * bins * int64_t(sizeof(T)));
  } else {
    unpack(tile, bins, channels, target, task.stride_c, task.stride_bin);
  }
}

}  // namespace

template <class T>
void roi_align_channels_last(const RoiAlignForward<T>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const RoiTaps<Acc<T>>& roi = task.rois[i];
    const FeatureMap<const T>& map = task.levels[roi.level];
    const T* features = map.data + roi.image * map.stride_n;
    const int32_t *y = roi.begin, *x = roi.begin + task.pooled_height + 1;
    T* out = task.output + roi.row * task.stride_roi;
    for (int64_t ph = 0; ph < task.pooled_height; ++ph)
      for (int64_t pw = 0; pw < task.pooled_width; ++pw, out += task.stride_bin) {
        const Tap<Acc<T>>*y0 = roi.taps + y[ph], *y1 = roi.taps + y[ph + 1];
        const Tap<Acc<T>>*x0 = roi.taps + x[pw], *x1 = roi.taps + x[pw + 1];
        int64_t c = bin_vectors<8>(features, map, y0, y1, x0, x1, 0, out);
        c = bin_vectors<4>(features, map, y0, y1, x0, x1, c, out);
        c = bin_vectors<1>(features, map, y0, y1, x0, x1, c, out);
        if (c < map.channels) bin_tail(features, map, y0, y1, x0, x1, c, out);
      }
  }
}

template <class T>
void roi_align_packed(const RoiAlignForward<T>& task, int64_t begin, int64_t end, int64_t channel, Acc<T>* scratch) {
  constexpr int L = kLanes<Acc<T>>;
  const FeatureMap<const T>& map = task.levels[task.rois[begin].level];
  const int channels = int(map.channels - channel < L ? map.channels - channel : L);
  pack_image(map, task.rois[begin].image, channel, channels, scratch);
  for (int64_t i = begin; i < end; ++i) {
    const RoiTaps<Acc<T>>& roi = task.rois[i];
    pool_block(task, roi, roi.taps, scratch, map.width * L, channel, channels, scratch + map.height * map.width * L);
  }
  if (task.stream) stream_end();
}

template <class T>
void roi_align_windowed(const RoiAlignForward<T>& task, int64_t i, int64_t channel, Acc<T>* scratch) {
  constexpr int L = kLanes<Acc<T>>;
  const RoiTaps<Acc<T>>& roi = task.rois[i];
  const FeatureMap<const T>& map = task.levels[roi.level];
  const int channels = int(map.channels - channel < L ? map.channels - channel : L);
  const int32_t y_taps = roi.begin[task.pooled_height], taps = roi.begin[task.pooled_height + task.pooled_width + 1];
  int32_t left = int32_t(map.width), right = -1;
  for (int32_t b = y_taps; b < taps; ++b) {
    left = roi.taps[b].index < left ? roi.taps[b].index : left;
    right = roi.taps[b].index > right ? roi.taps[b].index : right;
  }
  // Rows are packed one below the other, only those with a tap; taps[] says where each came to lie.
  Acc<T>* const tile = scratch;
  Tap<Acc<T>>* const local = reinterpret_cast<Tap<Acc<T>>*>(tile + 2 * task.pooled_height * task.pooled_width * L);
  Acc<T>* const window = tile + 2 * task.pooled_height * task.pooled_width * L + int64_t(taps) * L;
  const int64_t width = right - left + 1;
  const T* features = map.data + roi.image * map.stride_n + channel * map.stride_c + left * map.stride_x;
  int32_t rows = 0;
  for (int32_t a = 0; a < y_taps; ++a) {
    int32_t place = rows;
    for (int32_t back = a - 1; back >= 0 && back >= a - 2; --back)
      if (roi.taps[back].index == roi.taps[a].index) place = local[back].index;
    local[a] = {place, roi.taps[a].weight};
    if (place == rows && width > 0) {
      pack(features + roi.taps[a].index * map.stride_y, map.stride_c, map.stride_x, width, channels,
           window + rows * width * L);
      ++rows;
    }
  }
  for (int32_t b = y_taps; b < taps; ++b) local[b] = {roi.taps[b].index - left, roi.taps[b].weight};
  pool_block(task, roi, local, window, width * L, channel, channels, tile);
  if (task.stream) stream_end();
}

template <class T>
void roi_align_backward_packed(const RoiAlignBackward<T>& task, int64_t level, int64_t image, int64_t begin,
                               int64_t end, int64_t channel, Acc<T>* scratch) {
  constexpr int L = kLanes<Acc<T>>;
  const FeatureMap<T>& map = task.levels[level];
  const int channels = int(map.channels - channel < L ? map.channels - channel : L);
  const int64_t pixels = map.height * map.width, bins = task.pooled_height * task.pooled_width;
  memset(scratch, 0, size_t(pixels * L) * sizeof(Acc<T>));
  Acc<T>* tile = scratch + pixels * L;  // [bins][L]
  for (int64_t i = begin; i < end; ++i) {
    const RoiTaps<Acc<T>>& roi = task.rois[i];
    const int32_t *y = roi.begin, *x = roi.begin + task.pooled_height + 1;
    pack(task.grad + roi.row * task.stride_roi + channel * task.stride_c, task.stride_c, task.stride_bin, bins,
         channels, tile);
    const Acc<T>* grad = tile;
    for (int64_t ph = 0; ph < task.pooled_height; ++ph)
      for (int64_t pw = 0; pw < task.pooled_width; ++pw, grad += L) {
        const Vec<Acc<T>> g = load(grad);
        for (int32_t a = y[ph]; a < y[ph + 1]; ++a) {
          Acc<T>* row = scratch + roi.taps[a].index * map.width * L;
          const Vec<Acc<T>> row_grad = g * roi.taps[a].weight;
          for (int32_t b = x[pw]; b < x[pw + 1]; ++b) {
            Acc<T>* pixel = row + roi.taps[b].index * int64_t(L);
            store(pixel, fma(row_grad, broadcast(roi.taps[b].weight), load(pixel)));
          }
        }
      }
  }
  unpack_image(scratch, map, image, channel, channels);
}

template <class T>
int roi_align_block_channels() {
  return kLanes<Acc<T>>;
}

#define FASTCV_INSTANTIATE(T)                                                                                      \
  template void roi_align_channels_last<T>(const RoiAlignForward<T>&, int64_t, int64_t);                           \
  template void roi_align_packed<T>(const RoiAlignForward<T>&, int64_t, int64_t, int64_t, Acc<T>*);                \
  template void roi_align_windowed<T>(const RoiAlignForward<T>&, int64_t, int64_t, Acc<T>*);                       \
  template void roi_align_backward_packed<T>(const RoiAlignBackward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                             Acc<T>*);                                                             \
  template int roi_align_block_channels<T>();
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
