// What the kernels of pooling share: windows of a contiguous row in vectors, one lane for each window.
#pragma once

#include "channel_block.h"
#include "pool_lanes.h"
#include "pool_window.h"

namespace fastcv::FASTCV_ISA {

// Taps [first, last) of window o that lie inside the input.
struct TapRange {
  int64_t first, last;
};
FASTCV_INLINE TapRange taps_inside(const PoolAxis& axis, int64_t o) {
  const int64_t start = axis.start(o), d = axis.dilation, below = axis.input - start;
  if (d == 1) return {start < 0 ? -start : 0, min_of(axis.kernel, below)};
  return {start < 0 ? (d - 1 - start) / d : 0, below > 0 ? min_of(axis.kernel, (below + d - 1) / d) : 0};
}

// p[0], p[stride], p[2 stride], ... and nothing behind the last; S = 0 stands for strides other than 1 and 2.
template <int S, class T>
FASTCV_INLINE Vec<Acc<T>> load_strided(const T* p, int64_t stride) {
  constexpr int L = kLanes<Acc<T>>;
  if constexpr (S == 1) {
    return load(p);
  } else if constexpr (S == 2) {
    return even_then_odd_lanes(load(p), load(p + L - 1), LaneIndices<Acc<T>>{});
  } else {
    Vec<Acc<T>> v;
    for (int l = 0; l < L; ++l) v[l] = to_accumulate(p[l * stride]);
    return v;
  }
}

// f(i, j, values) for rows i of the taps of windows side by side, the first of which starts at `window`. K is the
// number of taps in a row where the compiler shall know it, for windows without dilation; else 0.
template <int S, int K, class T, class F>
FASTCV_INLINE void each_tap_of(const T* window, int64_t row_stride, TapRange rows, const PoolAxis& x, const F& f) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t kernel = K ? K : x.kernel, dilation = K ? 1 : x.dilation, stride = x.stride;
  const T* row = window + rows.first * row_stride;
  for (int64_t i = rows.first; i < rows.last; ++i, row += row_stride) {
    int64_t j = 0;
    if constexpr (S == 2) {  // two taps are the even and the odd lanes of the same two loads
      for (; dilation == 1 && j + 1 < kernel; j += 2) {
        const Vec<Acc<T>> a = load(row + j), b = load(row + j + L);
        f(i, j, even_lanes(a, b, LaneIndices<Acc<T>>{}));
        f(i, j + 1, odd_lanes(a, b, LaneIndices<Acc<T>>{}));
      }
    }
    for (; j < kernel; ++j) f(i, j, load_strided<S>(row + j * dilation, stride));
  }
}

// Where row `row` of maps of `height` rows lies, counted up: divisions take as long as a short row of pooling.
struct RowAt {
  int64_t channels, height, image, channel, y;

  RowAt(int64_t row, int64_t channels_, int64_t height_)
      : channels(channels_), height(height_), image(row / height / channels), channel(row / height % channels),
        y(row % height) {}
  int64_t plane() const { return image * channels + channel; }
  void operator++() {
    if (++y < height) return;
    y = 0;
    if (++channel == channels) channel = 0, ++image;
  }
};

// A plane of a map. All between the tensor's first and last element may be read, rows of other planes too.
template <class T>
struct Plane {
  const T* tensor;
  int64_t size;   // elements from the tensor's first to behind its last
  int64_t first;  // that of the plane
  int64_t stride_y;
};

template <class T>
FASTCV_INLINE Plane<T> plane_of(const FeatureMap<const T>& m, const RowAt& row) {
  const int64_t size = (m.images - 1) * m.stride_n + (m.channels - 1) * m.stride_c + (m.height - 1) * m.stride_y +
                       (m.width - 1) * m.stride_x + 1;
  return {m.data, size, row.image * m.stride_n + row.channel * m.stride_c, m.stride_y};
}

// row[x], row[x + stride], ...; `outside` where that is not in [0, size).
template <class T>
__attribute__((noinline)) Vec<Acc<T>> load_one_by_one(const T* row, int64_t x, int64_t stride, int64_t size,
                                                      Acc<T> outside) {
  Vec<Acc<T>> v;
  for (int l = 0; l < kLanes<Acc<T>>; ++l, x += stride) v[l] = x >= 0 && x < size ? to_accumulate(row[x]) : outside;
  return v;
}

// f(i, j, values) for the taps of n windows ox, ox + 1, ... of one output row, a lane for each; taps left or right of
// the map hold `outside`. Rows above and below are left out.
//
// Where windows stand out of the map, or n is less than a vector, what lies beside the row is read and left out again,
// unless the processor can leave out lanes. Only windows beside which the tensor ends are read one by one.
template <int S, int K, class T, class F>
FASTCV_INLINE void each_tap(const PoolGeometry& g, const Plane<T>& plane, TapRange rows, int64_t oy, int64_t ox, int n,
                            Acc<T> outside, const F& f) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  constexpr int64_t kMost = int64_t(1) << 30;  // positions may have 32 bits
  const PoolAxis& x = g.x;
  const int64_t x0 = x.start(ox), span = (x.kernel - 1) * x.dilation, reach = span + (L - 1) * x.stride + 1;
  const int64_t row = plane.first + g.y.start(oy) * plane.stride_y, step = g.y.dilation * plane.stride_y;
  const bool readable = row + rows.first * step + x0 >= 0 && row + (rows.last - 1) * step + x0 + reach <= plane.size;
  if (__builtin_expect(readable && x0 >= 0 && x0 + (n - 1) * x.stride + span < x.input, 1)) {
    each_tap_of<S, K>(plane.tensor + row + x0, step, rows, x, f);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (S == 1 && sizeof(T) == 4) {
    for (int64_t i = rows.first; i < rows.last; ++i)
      for (int64_t j = 0; j < (K ? K : x.kernel); ++j) {
        const int64_t at = x0 + j * (K ? 1 : x.dilation);
        const LaneRange lanes = lanes_inside<float>(at, x.input);
        f(i, j, load_lanes(plane.tensor + row + i * step + at, lanes.first, lanes.last, broadcast(outside)));
      }
    return;
  }
#endif
  const bool side_by_side = readable && reach < kMost && x.input < kMost;
  const Vec<P> lanes = iota<P>() * P(x.stride);
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const T* const from = plane.tensor + row + i * step;
    for (int64_t j = 0; j < x.kernel; ++j) {
      const int64_t at = x0 + j * x.dilation;
      Vec<Acc<T>> value;
      if (side_by_side) {
        const Vec<P> column = lanes + P(at);
        value = load_strided<S>(from + at, x.stride);
        value = (column >= 0) & (column < P(x.input)) ? value : broadcast(outside);
      } else {
        value = load_one_by_one(from, at, x.stride, x.input, outside);
      }
      f(i, j, value);
    }
  }
}

// Whether a map is larger than what the second-level caches of a few cores hold.
template <class T>
FASTCV_INLINE bool is_far(const FeatureMap<const T>& m) {
  return m.images * m.channels * m.height * m.width * int64_t(sizeof(T)) >= int64_t(4) << 20;
}

// Asks for the rows that the windows two rows of output below will read. Processors foresee one row, not that the next
// ones take turns: without it 2x2 over 64 x 224 x 224 takes twice the time.
template <class T>
FASTCV_INLINE void prefetch_windows_below(const PoolGeometry& g, const Plane<T>& plane, int64_t oy) {
  const T* const first = plane.tensor + plane.first + g.y.start(oy + 2) * plane.stride_y;
  for (int64_t i = 0; i < min_of(g.y.stride, 4); ++i)
    for (int64_t x = 0; x < g.x.input; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(first + i * plane.stride_y + x);
}

// f(shape) with what the compiler shall know of the columns: the stride where it is 1 or 2, and for float the kernel of
// the common windows; 0 for all others.
template <int S, int K>
struct Columns {
  static constexpr int stride = S, kernel = K;
};
template <class F>
FASTCV_INLINE auto with_strides(const PoolAxis& x, const F& f) {
  return x.stride == 2 ? f(Columns<2, 0>{}) : x.stride == 1 ? f(Columns<1, 0>{}) : f(Columns<0, 0>{});
}
template <class T, class F>
FASTCV_INLINE auto with_columns(const PoolAxis& x, const F& f) {
  if constexpr (sizeof(T) == 4) {
    const bool dense = x.dilation == 1;
    if (dense && x.stride == 2 && x.kernel == 2) return f(Columns<2, 2>{});
    if (dense && x.stride == 2 && x.kernel == 3) return f(Columns<2, 3>{});
    if (dense && x.stride == 1 && x.kernel == 3) return f(Columns<1, 3>{});
  }
  return with_strides(x, f);
}
// f(c, n, vectors) for n channels from c on: four vectors, one, or what is left of one.
template <int V>
struct Vectors {
  static constexpr int value = V;
};
template <class A, class F>
FASTCV_INLINE void each_channel_block(int64_t channels, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) f(c, L, Vectors<4>{});
  for (; c + L <= channels; c += L) f(c, L, Vectors<1>{});
  if (c < channels) f(c, int(channels - c), Vectors<1>{});
}

// Writes phases[r], the pixels x + r, x + r + S, ..., clipped to the row.
template <int S, class T>
FASTCV_INLINE void store_phases(const Vec<Acc<T>>* phases, T* row, int64_t x, int64_t width, bool stream) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  static_assert(S == 1 || S == 2);
  Vec<A> pieces[S];
  if constexpr (S == 1) {
    pieces[0] = phases[0];
  } else {
    pieces[0] = in_turn<0>(phases[0], phases[1], LaneIndices<A>{});
    pieces[1] = in_turn<L / 2>(phases[0], phases[1], LaneIndices<A>{});
  }
  for (int s = 0; s < S; ++s, x += L) {
    if (x >= 0 && x + L <= width) {
      store_through(row + x, pieces[s], stream);
    } else if (x >= 0) {
      if (x < width) store_first(row + x, pieces[s], int(width - x));
    } else {
      T copy[L];
      store(copy, pieces[s]);
      const int64_t first = max_of(0, -x), last = min_of(L, width - x);
      if (first < last) memcpy(row + x + first, copy + first, size_t(last - first) * sizeof(T));
    }
  }
}

}  // namespace fastcv::FASTCV_ISA
