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

enum class Remember { nothing, compact, flat };

template <Remember R>
TapIndices tap_indices(const PoolGeometry& g) {
  return R == Remember::flat ? TapIndices{g.y.dilation * g.x.input, g.x.dilation} : TapIndices{g.x.kernel, 1};
}

template <class T>
constexpr Acc<T> kLowest = -Acc<T>(__builtin_inf());

template <int S, int K, Remember R, class T>
void pool_rows(const MaxPool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;  // a copy: stores cannot change it
  const TapIndices taps = tap_indices<R>(g);
  const Vec<P> lanes = iota<P>();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.y.output, oy = task % g.y.output;
    const T* map = t.input.data + plane / t.input.channels * t.input.stride_n + plane % t.input.channels * t.input.stride_c;
    const TapRange rows = taps_inside(g.y, oy);
    for (int64_t ox = 0; ox < g.x.output; ox += L) {
      const int n = int(least(L, g.x.output - ox));
      const int64_t x0 = g.x.start(ox), at = task * g.x.output + ox;
      if (t.stream)
        prefetch_rows(map + (g.y.start(oy) + 2 * g.y.stride) * t.input.stride_y + x0, t.input.stride_y, g.y.stride,
                      L * g.x.stride);
      // All of a window may be -infinity: its first pixel is the maximum then.
      Vec<Acc<T>> best = broadcast(kLowest<T>);
      Vec<P> index = Vec<P>{} + P(rows.first * taps.step_y);
      if (R != Remember::nothing && x0 < 0)
        for (int l = 0; l < L; ++l) index[l] += P(taps_inside(g.x, ox + l).first * taps.step_x);
      each_tap<S, K>(g, map, t.input.stride_y, rows, oy, ox, kLowest<T>,
                  [&](int64_t i, int64_t j, Vec<Acc<T>> value) FASTCV_INLINE_LAMBDA {
                    const auto better = takes_over(value, best);
                    best = better ? value : best;
                    if (R != Remember::nothing)
                      index = better ? Vec<P>{} + P(i * taps.step_y + j * taps.step_x) : index;
                  });
      if (n == L)
        store_through(t.output + at, best, t.stream);
      else
        store_first(t.output + at, best, n);
      if constexpr (R == Remember::compact) store_indices<P>(t.compact + at, index, n);
      if constexpr (R == Remember::flat)
        store_indices(t.flat + at, index + P(g.y.start(oy) * g.x.input + x0) + lanes * P(g.x.stride), n);
    }
  }
  if (t.stream) stream_end();
}

template <Remember R, class T>
void pool_pixels(const MaxPool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;
  const FeatureMap<const T> in = t.input;
  const TapIndices taps = tap_indices<R>(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.y.output, oy = task % g.y.output;
    const TapRange rows = taps_inside(g.y, oy);
    for (int64_t ox = 0; ox < g.x.output; ++ox) {
      const TapRange columns = taps_inside(g.x, ox);
      const int64_t y0 = g.y.start(oy), x0 = g.x.start(ox), at = (task * g.x.output + ox) * in.channels;
      const int64_t base = R == Remember::flat ? y0 * g.x.input + x0 : 0;
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
              const Vec<Acc<T>> value = load_n(tap + v * L, n);
              const auto better = takes_over(value, best[v]);
              best[v] = better ? value : best[v];
              if (R != Remember::nothing) index[v] = better ? here : index[v];
            }
          }
        for (int v = 0; v < V; ++v) {
          const int64_t to = at + c + v * L;
          if (n == L)
            store_through(t.output + to, best[v], t.stream);
          else
            store_first(t.output + to, best[v], n);
          if constexpr (R == Remember::compact) store_indices<P>(t.compact + to, index[v], n);
          if constexpr (R == Remember::flat) store_indices(t.flat + to, index[v], n);
        }
      });
    }
  }
  if (t.stream) stream_end();
}

}  // namespace

template <class T>
void max_pool2d_contiguous(const MaxPool<T>& t, int64_t begin, int64_t end) {
  with_columns(t.geometry.x, [&](auto c) {
    constexpr int S = c.stride, K = c.kernel;
    if (t.flat)
      pool_rows<S, K, Remember::flat>(t, begin, end);
    else if (t.compact)
      pool_rows<S, K, Remember::compact>(t, begin, end);
    else
      pool_rows<S, K, Remember::nothing>(t, begin, end);
  });
}

template <class T>
void max_pool2d_channels_last(const MaxPool<T>& t, int64_t begin, int64_t end) {
  if (t.flat)
    pool_pixels<Remember::flat>(t, begin, end);
  else if (t.compact)
    pool_pixels<Remember::compact>(t, begin, end);
  else
    pool_pixels<Remember::nothing>(t, begin, end);
}

#define FASTCV_INSTANTIATE(T)                                                         \
  template void max_pool2d_contiguous<T>(const MaxPool<T>&, int64_t, int64_t);        \
  template void max_pool2d_channels_last<T>(const MaxPool<T>&, int64_t, int64_t);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
