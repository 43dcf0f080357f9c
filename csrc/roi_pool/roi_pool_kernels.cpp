// The loops of RoI pooling: running maxima and their positions, vectorised over channels.
//
// Bytes for 1000 regions of 256 channels, 7x7 bins, on a 200x272 map in float32: the map 56 MB, values and positions
// 100 MB. Comparisons: every pixel of a region once, about 700 x 256 x 1000 = 0.2 G, in vectors of 16 with AVX-512.
#include "roi_pool.h"

#include "../common/channel_block.h"
#include "../common/positions.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
struct Maxima {
  Vec<Acc<T>> value;
  Vec<Position<T>> position;
};

// NaN never wins: it compares false. A bin of nothing but NaN gives -infinity at its first pixel.
template <int NV, class T>
FASTCV_INLINE void max_bin(const T* features, int64_t stride_y, int64_t stride_x, int64_t map_width, PixelRange rows,
                           PixelRange columns, Maxima<T> (&best)[NV]) {
  const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
  const Position<T> first = empty ? -1 : Position<T>(rows.begin * map_width + columns.begin);
  for (int v = 0; v < NV; ++v)
    best[v] = {broadcast(empty ? Acc<T>(0) : -Acc<T>(__builtin_inf())), Vec<Position<T>>{} + first};
  for (int64_t y = rows.begin; y < rows.end; ++y)
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const T* pixel = features + y * stride_y + x * stride_x;
      const Vec<Position<T>> here = Vec<Position<T>>{} + Position<T>(y * map_width + x);
      for (int v = 0; v < NV; ++v) {
        const Vec<Acc<T>> value = load(pixel + v * kLanes<Acc<T>>);
        const auto better = value > best[v].value;
        best[v].value = better ? value : best[v].value;
        best[v].position = better ? here : best[v].position;
      }
    }
}

template <class T>
FASTCV_INLINE void store_positions(int32_t* out, Vec<Position<T>> positions, int n) {
  int32_t narrow[kLanes<Acc<T>>];
  for (int i = 0; i < kLanes<Acc<T>>; ++i) narrow[i] = int32_t(positions[i]);
  memcpy(out, narrow, size_t(n) * sizeof(int32_t));
}

template <int NV, class T>
FASTCV_INLINE int64_t bin_vectors(const RoiPoolForward<T>& task, const T* features, PixelRange rows, PixelRange columns,
                                  int64_t c, int64_t at) {
  constexpr int L = kLanes<Acc<T>>;
  const FeatureMap<const T>& map = task.map;
  for (; c + NV * L <= map.channels; c += NV * L) {
    Maxima<T> best[NV];
    max_bin(features + c, map.stride_y, map.stride_x, map.width, rows, columns, best);
    for (int v = 0; v < NV; ++v) {
      store(task.output + at + c + v * L, best[v].value);
      store_positions<T>(task.argmax + at + c + v * L, best[v].position, L);
    }
  }
  return c;
}

// The last channels, fewer than a vector, one after the other.
template <class T>
void bin_tail(const RoiPoolForward<T>& task, const T* features, PixelRange rows, PixelRange columns, int64_t c,
              int64_t at) {
  const FeatureMap<const T>& map = task.map;
  const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
  for (; c < map.channels; ++c) {
    Acc<T> best = empty ? Acc<T>(0) : -Acc<T>(__builtin_inf());
    int32_t position = empty ? -1 : int32_t(rows.begin * map.width + columns.begin);
    for (int64_t y = rows.begin; y < rows.end; ++y)
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        const Acc<T> value = to_accumulate(features[c + y * map.stride_y + x * map.stride_x]);
        if (value > best) best = value, position = int32_t(y * map.width + x);
      }
    from_accumulate(best, task.output + at + c);
    task.argmax[at + c] = position;
  }
}

// A tile [bins][L] to the output of a region, past the caches where that is contiguous and larger than they.
template <class T, class A, class S>
void unpack_to(const RoiPoolForward<T>& task, const A* tile, int64_t bins, int channels, void* staged, S* target) {
  if (task.stream) {
    unpack(tile, bins, channels, static_cast<S*>(staged), bins, 1);
    stream_copy(target, staged, channels * bins * int64_t(sizeof(S)));
  } else {
    unpack(tile, bins, channels, target, task.stride_c, task.stride_bin);
  }
}

}  // namespace

template <class T>
void roi_pool_channels_last(const RoiPoolForward<T>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const PoolRegion& region = task.regions[i];
    const T* features = task.map.data + region.image * task.map.stride_n;
    int64_t at = region.row * task.stride_roi;
    for (int64_t ph = 0; ph < task.pooled_height; ++ph)
      for (int64_t pw = 0; pw < task.pooled_width; ++pw, at += task.stride_bin) {
        const PixelRange rows = region.rows[ph], columns = region.columns[pw];
        int64_t c = bin_vectors<8>(task, features, rows, columns, 0, at);
        c = bin_vectors<1>(task, features, rows, columns, c, at);
        bin_tail(task, features, rows, columns, c, at);
      }
  }
}

template <class T>
void roi_pool_packed(const RoiPoolForward<T>& task, int64_t begin, int64_t end, int64_t channel, int64_t first_row,
                     int64_t end_row, Acc<T>* scratch) {
  constexpr int L = kLanes<Acc<T>>;
  const FeatureMap<const T>& map = task.map;
  const int channels = int(map.channels - channel < L ? map.channels - channel : L);
  const int64_t bins = task.pooled_height * task.pooled_width;
  const T* source = map.data + task.regions[begin].image * map.stride_n + channel * map.stride_c;
  for (int64_t y = first_row; y < end_row; ++y)
    pack(source + y * map.stride_y, map.stride_c, map.stride_x, map.width, channels,
         scratch + (y - first_row) * map.width * L);
  Acc<T>* const values = scratch + (end_row - first_row) * map.width * L;  // [bins][L]
  int32_t* const positions = reinterpret_cast<int32_t*>(values + bins * L);
  Acc<T>* const staged = values + 2 * bins * L;
  const Acc<T>* const image = scratch - first_row * map.width * L;
  for (int64_t i = begin; i < end; ++i) {
    const PoolRegion& region = task.regions[i];
    int64_t bin = 0;
    for (int64_t ph = 0; ph < task.pooled_height; ++ph)
      for (int64_t pw = 0; pw < task.pooled_width; ++pw, ++bin) {
        Maxima<Acc<T>> best[1];
        max_bin(image, map.width * L, L, map.width, region.rows[ph], region.columns[pw], best);
        store(values + bin * L, best[0].value);
        store_positions<Acc<T>>(positions + bin * L, best[0].position, L);
      }
    const int64_t at = region.row * task.stride_roi + channel * task.stride_c;
    unpack_to(task, values, bins, channels, staged, task.output + at);
    if constexpr (sizeof(Acc<T>) == sizeof(int32_t)) {  // moved as they are, like floats
      unpack_to(task, reinterpret_cast<const float*>(positions), bins, channels, staged,
                reinterpret_cast<float*>(task.argmax + at));
    } else {
      for (int c = 0; c < channels; ++c)
        for (int64_t b = 0; b < bins; ++b)
          task.argmax[at + c * task.stride_c + b * task.stride_bin] = positions[b * L + c];
    }
  }
  if (task.stream) stream_end();
}

template <class T>
int roi_pool_block_channels() {
  return kLanes<Acc<T>>;
}

#define FASTCV_INSTANTIATE(T)                                                                                          \
  template void roi_pool_channels_last<T>(const RoiPoolForward<T>&, int64_t, int64_t);                                 \
  template void roi_pool_packed<T>(const RoiPoolForward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, Acc<T>*);    \
  template int roi_pool_block_channels<T>();
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
