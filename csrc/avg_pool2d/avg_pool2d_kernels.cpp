// The loops of average pooling: sums of windows over how many elements count, so that the mean of equal numbers is this
// number; gradients take products with reciprocals, as a division for each tap takes longer than all the rest.
//
// They are those of max pooling with an addition for each tap: a contiguous row a vector of windows at a time,
// channels-last maps a vector of channels. The gradient of a pixel is the sum over the windows that cover it of their
// gradient over their size, in reading order, and each pixel is written once.
//
// Bytes bound it for windows that do not overlap: 2x2 over 64 x 256 x 56 x 56 in float32 (a transition of DenseNet)
// reads 205 MB and writes 51 MB. 3x3 with stride 1 adds 9 times per output from the first-level cache.
#include "avg_pool2d.h"

#include "../common/pool_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <int S, int K, class T>
void average_rows(const AvgPool<T>& t, int64_t begin, int64_t end) {
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;
  const bool prefetch = is_far(t.input);
  RowAt row(begin, t.input.channels, g.y.output);
  for (int64_t task = begin; task < end; ++task, ++row) {
    const int64_t oy = row.y;
    const Plane<T> plane = plane_of(t.input, row);
    const TapRange rows = taps_inside(g.y, oy);
    if (prefetch) prefetch_windows_below(g, plane, oy);
    for (int64_t ox = 0; ox < g.x.output; ox += L) {
      const int n = int(min_of(L, g.x.output - ox));
      Vec<Acc<T>> sum{};
      each_tap<S, K>(g, plane, rows, oy, ox, n, Acc<T>(0),
                     [&](int64_t, int64_t, Vec<Acc<T>> value) FASTCV_INLINE_LAMBDA { sum += value; });
      store_part(t.output + task * g.x.output + ox, sum / (t.rows[oy] * load_some(t.columns + ox, n)), n, t.stream);
    }
  }
  if (t.stream) stream_end();
}

template <int S, class T>
void spread_rows(const AvgPoolBackward<T>& t, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const PoolAxis y = t.geometry.y, x = t.geometry.x;
  const int64_t stride = S ? S : x.stride, steps = S ? S : x.phases();
  RowAt here(begin, t.channels, y.input);
  for (int64_t task = begin; task < end; ++task, ++here) {
    const int64_t at = here.y;
    const T* const grads = t.grad + here.plane() * y.output * x.output;
    T* const row = t.output + task * x.input;
    for (int64_t o = x.padding / stride; o * stride < x.padding + x.input; o += L) {
      Vec<A> phases[S ? S : 1];
      for (int64_t r = 0; r < steps; ++r) {
        Vec<A> sum{};
        for (int32_t a = t.above.begin[at]; a < t.above.begin[at + 1]; ++a) {
          const int64_t oy = t.above.list[a].window;
          const T* const grad = grads + oy * x.output;
          for (int32_t b = t.beside.begin[r]; b < t.beside.begin[r + 1]; ++b) {
            const int64_t first = o - t.beside.list[b].window;
            const LaneRange lanes = lanes_inside<A>(first, x.output);
            if (lanes.last - lanes.first == L)
              sum += load(grad + first) * (t.rows[oy] * load(t.columns + first));
            else
              sum += load_lanes(grad + first, lanes.first, lanes.last) *
                     (t.rows[oy] * load_lanes(t.columns + first, lanes.first, lanes.last));
          }
        }
        const int64_t x0 = o * stride + r - x.padding;
        if constexpr (S == 0) {
          for (int64_t l = 0, px = x0; l < L && px < x.input; ++l, px += stride)
            if (px >= 0) from_accumulate(sum[l], row + px);
        } else {
          phases[r] = sum;
        }
      }
      if constexpr (S != 0) store_phases<S>(phases, row, o * stride - x.padding, x.input, t.stream);
    }
  }
  if (t.stream) stream_end();
}

// The same for windows of 2 x 2 side by side: each pixel has one.
template <class T>
void spread_rows_2x2(const AvgPoolBackward<T>& t, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t windows_y = t.geometry.y.output, windows = t.geometry.x.output, width = t.geometry.x.input;
  RowAt here(begin, t.channels, t.geometry.y.input);
  for (int64_t task = begin; task < end; ++task, ++here) {
    T* const row = t.output + task * width;
    const int64_t oy = here.y / 2;
    if (oy >= windows_y) {
      memset(row, 0, size_t(width) * sizeof(T));
      continue;
    }
    const T* const grad = t.grad + (here.plane() * windows_y + oy) * windows;
    for (int64_t o = 0; 2 * o < width; o += L) {
      const int n = int(max_of(0, min_of(L, windows - o)));
      const Vec<A> share = load_some(grad + o, n) * (t.rows[oy] * load_some(t.columns + o, n));
      const Vec<A> phases[2] = {share, share};
      store_phases<2>(phases, row, 2 * o, width, t.stream);
    }
  }
  if (t.stream) stream_end();
}

}  // namespace

template <class T>
void avg_pool2d_contiguous(const AvgPool<T>& t, int64_t begin, int64_t end) {
  with_columns<T>(t.geometry.x, [&](auto c) { average_rows<c.stride, c.kernel>(t, begin, end); });
}

template <class T>
void avg_pool2d_channels_last(const AvgPool<T>& t, int64_t begin, int64_t end) {
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry g = t.geometry;
  const FeatureMap<const T> in = t.input;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.y.output, oy = task % g.y.output;
    const TapRange rows = taps_inside(g.y, oy);
    for (int64_t ox = 0; ox < g.x.output; ++ox) {
      const TapRange columns = taps_inside(g.x, ox);
      const T* const window = in.data + image * in.stride_n + g.y.start(oy) * in.stride_y + g.x.start(ox) * in.stride_x;
      T* const to = t.output + (task * g.x.output + ox) * in.channels;
      const Acc<T> count = t.rows[oy] * t.columns[ox];
      each_channel_block<Acc<T>>(in.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<Acc<T>> sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Vec<Acc<T>>{};
        for (int64_t i = rows.first; i < rows.last; ++i)
          for (int64_t j = columns.first; j < columns.last; ++j) {
            const T* const tap = window + i * in.stride_y + j * in.stride_x + c;
            for (int v = 0; v < V; ++v) sum[v] += load_some(tap + v * L, n);
          }
        for (int v = 0; v < V; ++v) store_part(to + c + v * L, sum[v] / count, n, t.stream);
      });
    }
  }
  if (t.stream) stream_end();
}

template <class T>
void avg_pool2d_backward_contiguous(const AvgPoolBackward<T>& t, int64_t begin, int64_t end) {
  if (t.geometry.two_by_two()) return spread_rows_2x2(t, begin, end);
  with_strides(t.geometry.x, [&](auto c) { spread_rows<c.stride>(t, begin, end); });
}

template <class T>
void avg_pool2d_backward_channels_last(const AvgPoolBackward<T>& t, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const PoolAxis y = t.geometry.y, x = t.geometry.x;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / y.input, at = task % y.input;
    for (int64_t px = 0; px < x.input; ++px) {
      T* const to = t.output + (task * x.input + px) * t.channels;
      each_channel_block<A>(t.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<A> sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Vec<A>{};
        for (int32_t a = t.above.begin[at]; a < t.above.begin[at + 1]; ++a)
          for (int32_t b = t.beside.begin[px]; b < t.beside.begin[px + 1]; ++b) {
            const int64_t oy = t.above.list[a].window, ox = t.beside.list[b].window;
            const T* const grad = t.grad + ((image * y.output + oy) * x.output + ox) * t.channels + c;
            const A share = t.rows[oy] * t.columns[ox];
            for (int v = 0; v < V; ++v) sum[v] += load_some(grad + v * L, n) * share;
          }
        for (int v = 0; v < V; ++v) store_part(to + c + v * L, sum[v], n, t.stream);
      });
    }
  }
  if (t.stream) stream_end();
}

#define FASTCV_INSTANTIATE(T)                                                                          \
  template void avg_pool2d_contiguous<T>(const AvgPool<T>&, int64_t, int64_t);                         \
  template void avg_pool2d_channels_last<T>(const AvgPool<T>&, int64_t, int64_t);                      \
  template void avg_pool2d_backward_contiguous<T>(const AvgPoolBackward<T>&, int64_t, int64_t);        \
  template void avg_pool2d_backward_channels_last<T>(const AvgPoolBackward<T>&, int64_t, int64_t);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
