// The loops of adaptive pooling, vectorised over channels.
//
// A channels-last map is read in place, row of bins after row. Of a contiguous one rows of a block of channels come to
// scratch first, pixel by pixel (channel_block.h), as bins are too narrow to be vectors: each row once, and as many of
// them as the first-level cache holds. The mean of a whole plane is taken as it lies.
//
// Bytes bound it: the map is read once. The means of 2048 planes of 7x7 are 0.4 MB in float32 and 0.1 M additions.
#include "adaptive_pool2d.h"

#include "../common/pool_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

struct Bin {
  int64_t y0, y1, x0, x1;

  double size() const { return double((y1 - y0) * (x1 - x0)); }
};

template <int V, class S>
FASTCV_INLINE void mean_of(const S* map, int64_t stride_y, int64_t stride_x, const Bin& b, int n,
                           Vec<Acc<S>> (&mean)[V]) {
  constexpr int L = kLanes<Acc<S>>;
  Vec<Acc<S>> sum[V];
  for (int v = 0; v < V; ++v) sum[v] = Vec<Acc<S>>{};
  for (int64_t y = b.y0; y < b.y1; ++y)
    for (int64_t x = b.x0; x < b.x1; ++x)
      for (int v = 0; v < V; ++v) sum[v] += load_some(map + y * stride_y + x * stride_x + v * L, n);
  for (int v = 0; v < V; ++v) mean[v] = sum[v] / Acc<S>(b.size());
}

// Of a bin of many pixels: up to kMeanChannels channels, whose sums stay in the first-level cache, so that the map is
// read in runs of 8 KB. From memory that is half again as fast as runs of four vectors.
constexpr int64_t kMeanChannels = 2048, kManyPixels = 9;

template <class S>
FASTCV_INLINE void mean_of_channels(const S* map, int64_t stride_y, int64_t stride_x, const Bin& b, int64_t channels,
                                    S* mean) {
  using A = Acc<S>;
  constexpr int L = kLanes<A>;
  A sums[kMeanChannels];
  for (int64_t y = b.y0; y < b.y1; ++y)
    for (int64_t x = b.x0; x < b.x1; ++x) {
      const S* const pixel = map + y * stride_y + x * stride_x;
      const bool first = y == b.y0 && x == b.x0;
      each_channel_block<A>(channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        for (int v = 0; v < decltype(vectors)::value; ++v) {
          const Vec<A> value = load_some(pixel + c + v * L, n);
          store(sums + c + v * L, first ? value : load(sums + c + v * L) + value);
        }
      });
    }
  each_channel_block<A>(channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
    for (int v = 0; v < decltype(vectors)::value; ++v)
      store_some(mean + c + v * L, load(sums + c + v * L) / A(b.size()), n);
  });
}

template <int V, class S>
FASTCV_INLINE void maximum_of(const S* map, int64_t stride_y, int64_t stride_x, int64_t width, const Bin& b, int n,
                              Vec<Acc<S>> (&best)[V], Vec<Position<S>> (&index)[V]) {
  using P = Position<S>;
  constexpr int L = kLanes<Acc<S>>;
  for (int v = 0; v < V; ++v) {
    best[v] = broadcast(-Acc<S>(__builtin_inf()));
    index[v] = Vec<P>{} + P(b.y0 * width + b.x0);
  }
  for (int64_t y = b.y0; y < b.y1; ++y)
    for (int64_t x = b.x0; x < b.x1; ++x)
      for (int v = 0; v < V; ++v) {
        const Vec<Acc<S>> value = load_some(map + y * stride_y + x * stride_x + v * L, n);
        take_greater(value, Vec<P>{} + P(y * width + x), best[v], index[v]);
      }
}

// The last rows of a block of channels that were brought into scratch, [count][width][L]: row y in place y % count.
template <class T>
struct RowsHeld {
  const T* map;
  int64_t stride_c, stride_y, stride_x, width;
  int channels;
  int64_t count;
  Acc<T>* scratch;
  int64_t next = 0;  // the first row that was not brought

  Acc<T>* of(int64_t y) const { return scratch + (y & (count - 1)) * width * kLanes<Acc<T>>; }

  // Brings rows y to `last`, which may be `count`, and with them what fits of the rows up to `end`: long runs of pixels
  // make whole squares. What is asked for ascends.
  void bring(int64_t y, int64_t last, int64_t end) {
    if (last <= next) return;
    next = max_of(next, y);
    for (const int64_t stop = min_of(end, y + count); next < stop;) {
      const bool dense = stride_x == 1 && stride_y == width;
      const int64_t rows = dense ? min_of(stop - next, count - (next & (count - 1))) : 1;
      pack(map + next * stride_y, stride_c, stride_x, rows * width, channels, of(next));
      next += rows;
    }
  }
};

// Rows y0 <= y < y1 of a bin, of which those before are in `mean` already.
template <class T, class A>
FASTCV_INLINE void mean_of_rows(const RowsHeld<T>& rows, const Bin& b, int64_t y0, int64_t y1, A* mean) {
  constexpr int L = kLanes<A>;
  Vec<A> sum{};
  if (y0 > b.y0) sum = load(mean);
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = b.x0; x < b.x1; ++x) sum += load(rows.of(y) + x * L);
  store(mean, y1 == b.y1 ? sum / A(b.size()) : sum);
}

// The same for the maximum and its index, in the bits of a number.
template <class T, class A>
FASTCV_INLINE void maximum_of_rows(const RowsHeld<T>& rows, const Bin& b, int64_t y0, int64_t y1, A* maximum, A* at) {
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  Vec<A> best = broadcast(-A(__builtin_inf()));
  Vec<P> index = Vec<P>{} + P(b.y0 * rows.width + b.x0);
  if (y0 > b.y0) best = load(maximum), index = (Vec<P>)load(at);
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = b.x0; x < b.x1; ++x) {
      const Vec<A> value = load(rows.of(y) + x * L);
      take_greater(value, Vec<P>{} + P(y * rows.width + x), best, index);
    }
  store(maximum, best);
  store(at, (Vec<A>)index);
}

template <class T>
FASTCV_INLINE void unpack_indices(const Acc<T>* block, int64_t n, int channels, int64_t* to, int64_t stride_c,
                                  int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    const Vec<Position<T>> index = (Vec<Position<T>>)load(block + i * kLanes<Acc<T>>);
    for (int c = 0; c < channels; ++c) to[c * stride_c + i * stride] = index[c];
  }
}

}  // namespace

template <class T>
void adaptive_pool2d_channels_last(const AdaptivePool<T>& t, int64_t image, int64_t oy, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const FeatureMap<const T> in = t.input;
  const T* const map = in.data + image * in.stride_n + begin;
  const int64_t at = image * t.stride_n + begin;
  for (int64_t ox = 0; ox < t.x.bins; ++ox) {
    const Bin b{t.y.begin(oy), t.y.end(oy), t.x.begin(ox), t.x.end(ox)};
    const int64_t bin = at + (oy * t.x.bins + ox) * t.stride_bin;
    if (t.indices)
      each_channel_block<A>(end - begin, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<A> best[V];
        Vec<Position<T>> index[V];
        maximum_of(map + c, in.stride_y, in.stride_x, in.width, b, n, best, index);
        for (int v = 0; v < V; ++v) {
          store_some(t.output + bin + c + v * L, best[v], n);
          store_indices(t.indices + bin + c + v * L, index[v], n);
        }
      });
    else if (b.size() > kManyPixels)
      for (int64_t c = 0; c < end - begin; c += kMeanChannels)
        mean_of_channels(map + c, in.stride_y, in.stride_x, b, min_of(kMeanChannels, end - begin - c),
                         t.output + bin + c);
    else
      each_channel_block<A>(end - begin, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<A> mean[V];
        mean_of(map + c, in.stride_y, in.stride_x, b, n, mean);
        for (int v = 0; v < V; ++v) store_some(t.output + bin + c + v * L, mean[v], n);
      });
  }
}

template <class T>
void adaptive_pool2d_packed(const AdaptivePool<T>& t, int64_t image, int64_t channel, int64_t begin, int64_t end,
                            Acc<T>* scratch) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const FeatureMap<const T> in = t.input;
  const int channels = int(min_of(L, in.channels - channel));
  const int64_t bins = t.x.bins, to = image * t.stride_n + channel * t.stride_c, held = t.bin_rows_held();
  RowsHeld<T> rows{in.data + image * in.stride_n + channel * in.stride_c,
                   in.stride_c,
                   in.stride_y,
                   in.stride_x,
                   in.width,
                   channels,
                   t.rows_held(),
                   scratch};
  A* const values = scratch + rows.count * in.width * L;  // [held][bins][L]
  A* const indices = values + held * bins * L;            // [bins][L], of this row of bins
  for (int64_t first = begin, oy = begin; oy < end; ++oy) {
    const int64_t y0 = t.y.begin(oy), y1 = t.y.end(oy), at = to + oy * bins * t.stride_bin;
    A* const sums = values + (oy - first) * bins * L;
    for (int64_t y = y0; y < y1; y += rows.count) {
      const int64_t last = min_of(y1, y + rows.count);
      rows.bring(y, last, t.y.end(end - 1));
      for (int64_t ox = 0; ox < bins; ++ox) {
        const Bin b{y0, y1, t.x.begin(ox), t.x.end(ox)};
        if (t.indices)
          maximum_of_rows(rows, b, y, last, sums + ox * L, indices + ox * L);
        else
          mean_of_rows(rows, b, y, last, sums + ox * L);
      }
    }
    if (t.indices)
      unpack_indices<T>(indices, bins, channels, t.indices + at, t.stride_c, t.stride_bin);
    if (oy + 1 == end || oy + 1 == first + held) {
      unpack(values, (oy + 1 - first) * bins, channels, t.output + to + first * bins * t.stride_bin, t.stride_c,
             t.stride_bin);
      first = oy + 1;
    }
  }
}

template <class T>
void global_avg_pool2d(const AdaptivePool<T>& t, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const FeatureMap<const T> in = t.input;
  const int64_t pixels = in.height * in.width;
  for (int64_t i = begin; i < end;) {
    // As many planes as a vector has lanes; their sums are added across by turning rows into columns.
    const int64_t image = i / in.channels, c = i % in.channels;
    const int n = int(min_of(L, min_of(end - i, in.channels - c)));
    Vec<A> rows[L];
    for (int l = 0; l < L; ++l) {
      const T* const plane = in.data + image * in.stride_n + (c + (l < n ? l : 0)) * in.stride_c;
      Vec<A> sums[4] = {};
      int64_t p = 0;
      for (; p + 4 * L <= pixels; p += 4 * L)
        for (int v = 0; v < 4; ++v) sums[v] += load(plane + p + v * L);
      for (; p + L <= pixels; p += L) sums[0] += load(plane + p);
      if (p < pixels) sums[1] += load_first(plane + p, int(pixels - p));
      rows[l] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    transpose(rows);
    for (int half = L / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) rows[l] += rows[l + half];
    store_some(t.output + image * t.stride_n + c * t.stride_c, rows[0] / A(pixels), n);
    i += n;
  }
}

// What each pixel of a bin has of its gradient.
template <class T>
FASTCV_INLINE Acc<T> share(const AdaptiveAvgBackward<T>& t, int64_t oy, int64_t ox) {
  return Acc<T>(1 / Bin{t.y.begin(oy), t.y.end(oy), t.x.begin(ox), t.x.end(ox)}.size());
}

template <class T>
void adaptive_avg_pool2d_backward_channels_last(const AdaptiveAvgBackward<T>& t, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const FeatureMap<T> out = t.output;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / out.height, y = task % out.height;
    for (int64_t x = 0; x < out.width; ++x) {
      T* const to = out.data + image * out.stride_n + y * out.stride_y + x * out.stride_x;
      const int64_t first_y = y * t.y.bins / out.height, first_x = x * t.x.bins / out.width;
      int64_t end_y = first_y, end_x = first_x;  // of the bins that have the pixel
      while (end_y < t.y.bins && t.y.begin(end_y) <= y) ++end_y;
      while (end_x < t.x.bins && t.x.begin(end_x) <= x) ++end_x;
      const bool one = end_y - first_y == 1 && end_x - first_x == 1;
      const A only = one ? share(t, first_y, first_x) : A(0);
      each_channel_block<A>(out.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<A> sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Vec<A>{};
        for (int64_t oy = first_y; oy < end_y; ++oy)
          for (int64_t ox = first_x; ox < end_x; ++ox) {
            const T* const grad = t.grad + image * t.stride_n + (oy * t.x.bins + ox) * t.stride_bin + c;
            const A part = one ? only : share(t, oy, ox);
            for (int v = 0; v < V; ++v) sum[v] += load_some(grad + v * kLanes<A>, n) * part;
          }
        for (int v = 0; v < V; ++v) store_some(to + c + v * kLanes<A>, sum[v], n);
      });
    }
  }
}

template <class T>
void adaptive_avg_pool2d_backward_contiguous(const AdaptiveAvgBackward<T>& t, int64_t begin, int64_t end,
                                             Acc<T>* scratch) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const FeatureMap<T> out = t.output;
  const int64_t width = out.width;
  for (int64_t i = begin; i < end; ++i) {
    const T* const grad = t.grad + i / out.channels * t.stride_n + i % out.channels * t.stride_c;
    T* const plane = out.data + i * out.height * width;
    if (t.y.bins * t.x.bins == 1) {
      const int64_t pixels = out.height * width;
      const Vec<A> part = broadcast(to_accumulate(*grad) / A(pixels));
      int64_t p = 0;
      for (; p + L <= pixels; p += L) store(plane + p, part);
      if (p < pixels) store_first(plane + p, part, int(pixels - p));
      continue;
    }
    for (int64_t oy = 0; oy < t.y.bins; ++oy) {  // a row of bins, as wide as the map
      A* const row = scratch + oy * width;
      for (int64_t x = 0; x < width; ++x) row[x] = 0;
      for (int64_t ox = 0; ox < t.x.bins; ++ox) {
        const Bin b{t.y.begin(oy), t.y.end(oy), t.x.begin(ox), t.x.end(ox)};
        const A share = to_accumulate(grad[(oy * t.x.bins + ox) * t.stride_bin]) / A(b.size());
        for (int64_t x = b.x0; x < b.x1; ++x) row[x] += share;
      }
    }
    for (int64_t y = 0; y < out.height; ++y) {
      const int64_t first = y * t.y.bins / out.height;
      for (int64_t x = 0; x < width; x += L) {
        const int n = int(min_of(L, width - x));
        Vec<A> sum{};
        for (int64_t oy = first; oy < t.y.bins && t.y.begin(oy) <= y; ++oy)
          sum += load_some(scratch + oy * width + x, n);
        store_some(plane + y * width + x, sum, n);
      }
    }
  }
}

template <class T>
int adaptive_pool2d_block_channels() {
  return kLanes<Acc<T>>;
}

#define FASTCV_INSTANTIATE(T)                                                                                         \
  template void adaptive_pool2d_channels_last<T>(const AdaptivePool<T>&, int64_t, int64_t, int64_t, int64_t);         \
  template void adaptive_pool2d_packed<T>(const AdaptivePool<T>&, int64_t, int64_t, int64_t, int64_t, Acc<T>*);       \
  template void global_avg_pool2d<T>(const AdaptivePool<T>&, int64_t, int64_t);                                       \
  template void adaptive_avg_pool2d_backward_channels_last<T>(const AdaptiveAvgBackward<T>&, int64_t, int64_t);       \
  template void adaptive_avg_pool2d_backward_contiguous<T>(const AdaptiveAvgBackward<T>&, int64_t, int64_t, Acc<T>*); \
  template int adaptive_pool2d_block_channels<T>();
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
