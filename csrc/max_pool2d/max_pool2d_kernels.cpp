// The loops of max pooling: values and positions in one pass.
//
// A contiguous row is taken a vector of windows at a time: the values of tap (i, j) are one load where the stride is 1,
// and two loads and a shuffle where it is 2. On channels-last maps vectors run over channels. A tap costs two
// comparisons (greater, NaN) and two selections; its index is a constant, i * step_y + j * step_x, so that compact and
// flat indices differ in two numbers.
//
// Bytes bound it: 2x2 over 8x64x256x256 in float32 reads 134 MB and writes 34 MB of values and 8 MB of compact or 67 MB
// of flat indices; the arithmetic, 4 operations for each of 34 M elements in vectors of 16, is a tenth of that.
#include "max_pool2d.h"

#include "../common/pool_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

// Indices of a window's taps: i * step_y + j * step_x, and for flat ones the pixel of the first tap besides.
struct TapIndices {
  int64_t step_y, step_x;
};

template <class T>
FASTCV_INLINE TapIndices tap_indices(const MaxPool<T>& t) {
  const PoolGeometry& g = t.geometry;
  return t.flat ? TapIndices{g.y.dilation * g.x.input, g.x.dilation} : TapIndices{g.x.kernel, 1};
}

template <class T>
constexpr Acc<T> kLowest = -Acc<T>(__builtin_inf());

// Of the first taps inside the map of windows ox, ox + 1, ...
template <class P>
FASTCV_INLINE Vec<P> first_columns(const PoolAxis& x, int64_t ox) {
  const int64_t x0 = x.start(ox);
  if (x0 >= 0) return Vec<P>{};
  Vec<P> first;
  for (int l = 0; l < kLanes<P>; ++l) {
    const int64_t start = x0 + l * x.stride;
    first[l] = P(start >= 0 ? 0 : x.dilation == 1 ? -start : (x.dilation - 1 - start) / x.dilation);
  }
  return first;
}

template <int S, int K, bool Indices, class T>
void pool_rows(const MaxPool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;  // a copy: stores cannot change it
  const TapIndices taps = tap_indices(t);
  const Vec<P> lanes = iota<P>() * P(g.x.stride), left = first_columns<P>(g.x, 0) * P(taps.step_x);
  const bool prefetch = is_far(t.input);
  RowAt row(begin, t.input.channels, g.y.output);
  for (int64_t task = begin; task < end; ++task, ++row) {
    const int64_t oy = row.y;
    const Plane<T> plane = plane_of(t.input, row);
    const TapRange rows = taps_inside(g.y, oy);
    if (prefetch) prefetch_windows_below(g, plane, oy);
    for (int64_t ox = 0; ox < g.x.output; ox += L) {
      const int n = int(min_of(L, g.x.output - ox));
      const int64_t x0 = g.x.start(ox), at = task * g.x.output + ox;
      // All of a window may be -infinity: its first pixel is the maximum then.
      Vec<Acc<T>> best = broadcast(kLowest<T>);
      Vec<P> index{};
      if constexpr (Indices) {
        index += P(rows.first * taps.step_y);
        if (x0 < 0) index += ox == 0 ? left : first_columns<P>(g.x, ox) * P(taps.step_x);
      }
      each_tap<S, K>(g, plane, rows, oy, ox, n, kLowest<T>,
                     [&](int64_t i, int64_t j, Vec<Acc<T>> value) FASTCV_INLINE_LAMBDA {
                       if constexpr (Indices) {
                         take_greater(value, Vec<P>{} + P(i * taps.step_y + j * taps.step_x), best, index);
                       } else {
                         best = greater_of(value, best);
                       }
                     });
      store_part(t.output + at, best, n, t.stream);
      if constexpr (Indices) {
        if (t.flat)
          store_indices(t.flat + at, index + P(g.y.start(oy) * g.x.input + x0) + lanes, n);
        else
          store_indices<P>(t.compact + at, index, n);
      }
    }
  }
  if (t.stream) stream_end();
}

template <bool Indices, class T>
void pool_pixels(const MaxPool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;
  const FeatureMap<const T> in = t.input;
  const TapIndices taps = tap_indices(t);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.y.output, oy = task % g.y.output;
    const TapRange rows = taps_inside(g.y, oy);
    for (int64_t ox = 0; ox < g.x.output; ++ox) {
      const TapRange columns = taps_inside(g.x, ox);
      const int64_t y0 = g.y.start(oy), x0 = g.x.start(ox), at = (task * g.x.output + ox) * in.channels;
      const int64_t base = t.flat ? y0 * g.x.input + x0 : 0;
      const T* window = in.data + image * in.stride_n + y0 * in.stride_y + x0 * in.stride_x;
      each_channel_block<Acc<T>>(in.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<Acc<T>> best[V];
        Vec<P> index[V];
        for (int v = 0; v < V; ++v) {
          best[v] = broadcast(kLowest<T>);
          index[v] = Vec<P>{} + P(base + rows.first * taps.step_y + columns.first * taps.step_x);
        }
        for (int64_t i = rows.first; i < rows.last; ++i)
          for (int64_t j = columns.first; j < columns.last; ++j) {
            const T* tap = window + i * g.y.dilation * in.stride_y + j * g.x.dilation * in.stride_x + c;
            const Vec<P> here = Vec<P>{} + P(base + i * taps.step_y + j * taps.step_x);
            for (int v = 0; v < V; ++v) {
              const Vec<Acc<T>> value = load_some(tap + v * L, n);
              if constexpr (Indices)
                take_greater(value, here, best[v], index[v]);
              else
                best[v] = greater_of(value, best[v]);
            }
          }
        for (int v = 0; v < V; ++v) {
          const int64_t to = at + c + v * L;
          store_part(t.output + to, best[v], n, t.stream);
          if constexpr (Indices) {
            if (t.flat)
              store_indices(t.flat + to, index[v], n);
            else
              store_indices<P>(t.compact + to, index[v], n);
          }
        }
      });
    }
  }
  if (t.stream) stream_end();
}

}  // namespace

template <class T>
void max_pool2d_contiguous(const MaxPool<T>& t, int64_t begin, int64_t end) {
  with_columns<T>(t.geometry.x, [&](auto c) {
    constexpr int S = c.stride, K = c.kernel;
    t.flat || t.compact ? pool_rows<S, K, true>(t, begin, end) : pool_rows<S, K, false>(t, begin, end);
  });
}

template <class T>
void max_pool2d_channels_last(const MaxPool<T>& t, int64_t begin, int64_t end) {
  t.flat || t.compact ? pool_pixels<true>(t, begin, end) : pool_pixels<false>(t, begin, end);
}

#define FASTCV_INSTANTIATE(T)                                                         \
  template void max_pool2d_contiguous<T>(const MaxPool<T>&, int64_t, int64_t);        \
  template void max_pool2d_channels_last<T>(const MaxPool<T>&, int64_t, int64_t);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
