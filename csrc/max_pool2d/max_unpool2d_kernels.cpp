// The loops of max unpooling and of the gradients of both: from windows to the pixels that their indices name, and back.
//
// Towards the map each pixel asks the windows that cover it, in reading order, whether they point at it, and is written
// once: no zeros before, no two threads at one pixel, and the values of windows that meet are added, or the last one
// kept, in an order that no number of threads changes. A window is asked by a comparison of a vector of indices with a
// constant: the tap that would be this pixel (compact) or the pixel itself (flat). A flat index that points outside its
// window is not found; as every window is asked by each of its pixels once, counting what was found tells, and
// `anywhere` then goes by the indices one by one.
//
// Bytes bound it: 2x2 to 8x64x256x256 in float32 reads 34 MB and 8 or 67 MB of indices and writes 134 MB.
#include "max_pool2d.h"

#include "../common/pool_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class P>
FASTCV_INLINE int64_t sum_lanes(Vec<P> v) {
  int64_t sum = 0;
  for (int l = 0; l < kLanes<P>; ++l) sum += v[l];
  return sum;
}

template <class T>
struct Asked {
  Vec<Acc<T>> value;
  Vec<Position<T>> index;
};

// Windows o, o + 1, ... of a row; those outside [0, windows) have index -1, which is no pixel's.
template <class T, class I>
FASTCV_INLINE Asked<T> load_windows(const T* values, const I* indices, int64_t o, int64_t windows) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  if (o >= 0 && o + L <= windows) return {load(values + o), load_indices<P>(indices + o, L)};
  Asked<T> asked{{}, Vec<P>{} - 1};
  const int64_t first = most(0, -o), last = least(L, windows - o);
  if (first == 0 && last > 0) return {load_first(values + o, int(last)), load_indices<P>(indices + o, int(last))};
  Acc<T> value[L] = {};
  for (int64_t l = first; l < last; ++l) {
    value[l] = to_accumulate(values[o + l]);
    asked.index[l] = indices[o + l] >> 31 ? P(-1) : P(indices[o + l]);
  }
  asked.value = load(value);
  return asked;
}

// Writes vectors of the pixels u, u + stride, ... for each phase, u in padded coordinates, clipped to the row.
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
    } else {
      T copy[L];
      store(copy, pieces[s]);
      const int64_t first = most(0, -x), last = least(L, width - x);
      if (first < last) memcpy(row + x + first, copy + first, size_t(last - first) * sizeof(T));
    }
  }
}

template <int S, bool Sum, class I, class T>
int64_t unpool_rows(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  constexpr bool kFlat = sizeof(I) == 8;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  const int64_t stride = S ? S : x.stride;
  const Vec<P> lanes = iota<P>() * P(stride);
  int64_t found = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / y.input, at = task % y.input;
    T* const row = t.to + task * x.input;
    Vec<P> row_found{};
    for (int64_t o = x.padding / stride; o * stride < x.padding + x.input; o += L) {
      Vec<A> phases[S ? S : 1];
      for (int64_t r = 0; r < stride; ++r) {
        const int64_t x0 = o * stride + r - x.padding;
        const Vec<P> pixel = lanes + P(x0);
        const auto inside = (pixel >= 0) & (pixel < P(x.input));
        Vec<A> value{};
        for (int32_t v = t.rows.begin[at]; v < t.rows.begin[at + 1]; ++v) {
          const Covering above = t.rows.list[v];
          const int64_t first = (plane * y.output + above.window) * x.output;
          for (int32_t h = t.columns.begin[r]; h < t.columns.begin[r + 1]; ++h) {
            const Covering beside = t.columns.list[h];
            const Asked<T> asked = load_windows(t.from + first, indices + first, o - beside.window, x.output);
            const Vec<P> wanted = kFlat ? pixel + P(at * x.input) : Vec<P>{} + P(above.tap * x.kernel + beside.tap);
            const auto here = (asked.index == wanted) & inside;
            value = here ? (Sum ? value + asked.value : asked.value) : value;
            row_found -= (Vec<P>)here;
          }
        }
        if constexpr (S == 0) {
          for (int64_t l = 0, px = x0; l < L && px < x.input; ++l, px += stride)
            if (px >= 0) from_accumulate(value[l], row + px);
        } else {
          phases[r] = value;
        }
      }
      if constexpr (S != 0) store_phases<S>(phases, row, o * stride - x.padding, x.input, t.stream);
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

template <bool Sum, class I, class T>
int64_t unpool_pixels(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  int64_t found = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / y.input, at = task % y.input;
    Vec<P> row_found{};
    for (int64_t px = 0; px < x.input; ++px) {
      T* const to = t.to + (task * x.input + px) * t.channels;
      each_channel_block<A>(t.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        Vec<A> value[V];
        for (int v = 0; v < V; ++v) value[v] = Vec<A>{};
        for (int32_t a = t.rows.begin[at]; a < t.rows.begin[at + 1]; ++a)
          for (int32_t b = t.columns.begin[px]; b < t.columns.begin[px + 1]; ++b) {
            const Covering above = t.rows.list[a], beside = t.columns.list[b];
            const int64_t from = ((image * y.output + above.window) * x.output + beside.window) * t.channels + c;
            const int64_t wanted = sizeof(I) == 8 ? at * x.input + px : above.tap * x.kernel + beside.tap;
            for (int v = 0; v < V; ++v) {
              const auto here = load_indices<P>(indices + from + v * L, n) == Vec<P>{} + P(wanted);
              const Vec<A> given = load_n(t.from + from + v * L, n);
              value[v] = here ? (Sum ? value[v] + given : given) : value[v];
              row_found -= (Vec<P>)here;
            }
          }
        for (int v = 0; v < V; ++v) {
          if (n == L)
            store_through(to + c + v * L, value[v], t.stream);
          else
            store_first(to + c + v * L, value[v], n);
        }
      });
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

template <int S, class T>
void gather_rows(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolGeometry& g = t.geometry;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.y.output, oy = task % g.y.output;
    const T* const map = t.from + plane * g.y.input * g.x.input;
    const TapRange rows = taps_inside(g.y, oy);
    for (int64_t ox = 0; ox < g.x.output; ox += L) {
      const int n = int(least(L, g.x.output - ox));
      const int64_t at = task * g.x.output + ox;
      const Vec<P> index = load_indices<P>(t.compact + at, n);
      Vec<Acc<T>> value{};
      each_tap<S>(g, map, g.x.input, rows, oy, ox, Acc<T>(0),
                  [&](int64_t i, int64_t j, Vec<Acc<T>> tap) FASTCV_INLINE_LAMBDA {
                    value = index == Vec<P>{} + P(i * g.x.kernel + j) ? tap : value;
                  });
      if (n == L)
        store_through(t.to + at, value, t.stream);
      else
        store_first(t.to + at, value, n);
    }
  }
  if (t.stream) stream_end();
}

// Where element p of the windows of an image points, as a pixel of the map; -1 outside. Compact indices count taps.
template <class T>
struct Pointing {
  const MaxUnpool<T>& t;

  FASTCV_INLINE int64_t operator()(int64_t p, int64_t element) const {
    const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
    if (t.flat) {
      const int64_t pixel = t.flat[element];
      return pixel >= 0 && pixel < y.input * x.input ? pixel : -1;
    }
    const int64_t tap = t.compact[element];
    const int64_t py = y.start(p / x.output) + tap / x.kernel * y.dilation;
    const int64_t px = x.start(p % x.output) + tap % x.kernel * x.dilation;
    return tap < y.kernel * x.kernel && py >= 0 && py < y.input && px >= 0 && px < x.input ? py * x.input + px : -1;
  }
};

template <class V>
FASTCV_INLINE void set_or_add(bool sum, V value, V* to) {
  *to = sum ? *to + value : value;
}

}  // namespace

template <class T>
int64_t max_unpool2d_contiguous(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  return with_stride(t.geometry.x.stride, [&](auto s) {
    constexpr int S = decltype(s)::value;
    if (t.flat) return t.sum ? unpool_rows<S, true>(t, t.flat, begin, end) : unpool_rows<S, false>(t, t.flat, begin, end);
    return t.sum ? unpool_rows<S, true>(t, t.compact, begin, end) : unpool_rows<S, false>(t, t.compact, begin, end);
  });
}

template <class T>
int64_t max_unpool2d_channels_last(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  if (t.flat) return t.sum ? unpool_pixels<true>(t, t.flat, begin, end) : unpool_pixels<false>(t, t.flat, begin, end);
  return t.sum ? unpool_pixels<true>(t, t.compact, begin, end) : unpool_pixels<false>(t, t.compact, begin, end);
}

template <class T>
void max_unpool2d_gather_contiguous(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  with_stride(t.geometry.x.stride, [&](auto s) { gather_rows<decltype(s)::value>(t, begin, end); });
}

template <class T>
void max_unpool2d_gather_channels_last(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / y.output, oy = task % y.output;
    const TapRange rows = taps_inside(y, oy);
    for (int64_t ox = 0; ox < x.output; ++ox) {
      const TapRange columns = taps_inside(x, ox);
      const int64_t at = (task * x.output + ox) * t.channels;
      const T* const window = t.from + ((image * y.input + y.start(oy)) * x.input + x.start(ox)) * t.channels;
      each_channel_block<Acc<T>>(t.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        for (int v = 0; v < decltype(vectors)::value; ++v) {
          const Vec<P> index = load_indices<P>(t.compact + at + c + v * L, n);
          Vec<Acc<T>> value{};
          for (int64_t i = rows.first; i < rows.last; ++i)
            for (int64_t j = columns.first; j < columns.last; ++j) {
              const T* tap = window + (i * y.dilation * x.input + j * x.dilation) * t.channels + c + v * L;
              value = index == Vec<P>{} + P(i * x.kernel + j) ? load_n(tap, n) : value;
            }
          if (n == L)
            store_through(t.to + at + c + v * L, value, t.stream);
          else
            store_first(t.to + at + c + v * L, value, n);
        }
      });
    }
  }
  if (t.stream) stream_end();
}

template <class T>
int64_t max_unpool2d_anywhere(const MaxUnpool<T>& t, PlaneStrides map, PlaneStrides windows, int64_t image, int64_t begin,
                              int64_t end, Acc<T>* sums) {
  const int64_t pixels = t.geometry.y.input * t.geometry.x.input, count = t.geometry.y.output * t.geometry.x.output;
  const Pointing<T> pointing{t};
  for (int64_t c = begin; c < end; ++c) {
    T* const to = t.to + image * map.image + c * map.channel;
    const int64_t from = image * windows.image + c * windows.channel;
    if (sums) memset(sums, 0, size_t(pixels) * sizeof(Acc<T>));
    for (int64_t p = 0; p < pixels; ++p) from_accumulate(Acc<T>(0), to + p * map.pixel);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t element = from + p * windows.pixel, pixel = pointing(p, element);
      if (pixel < 0) return c * count + p;
      if (sums)
        sums[pixel] += to_accumulate(t.from[element]);
      else if constexpr (sizeof(T) == sizeof(Acc<T>))
        set_or_add(t.sum, t.from[element], to + pixel * map.pixel);
      else
        to[pixel * map.pixel] = t.from[element];
    }
    if (sums)
      for (int64_t p = 0; p < pixels; ++p) from_accumulate(sums[p], to + p * map.pixel);
  }
  return -1;
}

template <class T>
int64_t max_unpool2d_gather_anywhere(const MaxUnpool<T>& t, PlaneStrides map, PlaneStrides windows, int64_t image,
                                     int64_t begin, int64_t end, int32_t* owners) {
  const int64_t count = t.geometry.y.output * t.geometry.x.output;
  const Pointing<T> pointing{t};
  for (int64_t c = begin; c < end; ++c) {
    const T* const from = t.from + image * map.image + c * map.channel;
    const int64_t first = image * windows.image + c * windows.channel;
    for (int64_t p = 0; owners && p < count; ++p) {
      const int64_t pixel = pointing(p, first + p * windows.pixel);
      if (pixel < 0) return c * count + p;
      owners[pixel] = int32_t(p);  // the last one stays
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t element = first + p * windows.pixel, pixel = pointing(p, element);
      if (pixel < 0) return c * count + p;
      if (owners && owners[pixel] != int32_t(p))
        from_accumulate(Acc<T>(0), t.to + element);
      else
        t.to[element] = from[pixel * map.pixel];
    }
  }
  return -1;
}

#define FASTCV_INSTANTIATE(T)                                                                                          \
  template int64_t max_unpool2d_contiguous<T>(const MaxUnpool<T>&, int64_t, int64_t);                                  \
  template int64_t max_unpool2d_channels_last<T>(const MaxUnpool<T>&, int64_t, int64_t);                               \
  template void max_unpool2d_gather_contiguous<T>(const MaxUnpool<T>&, int64_t, int64_t);                              \
  template void max_unpool2d_gather_channels_last<T>(const MaxUnpool<T>&, int64_t, int64_t);                           \
  template int64_t max_unpool2d_anywhere<T>(const MaxUnpool<T>&, PlaneStrides, PlaneStrides, int64_t, int64_t,         \
                                            int64_t, Acc<T>*);                                                         \
  template int64_t max_unpool2d_gather_anywhere<T>(const MaxUnpool<T>&, PlaneStrides, PlaneStrides, int64_t, int64_t,  \
                                                   int64_t, int32_t*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
