// The loops of max unpooling and of the gradients of both: from windows to the pixels that their indices name, and
// back.
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
  if (o >= 0 && o + L <= windows) return {load(values + o), load_indices<P>(indices + o, LaneRange{0, L})};
  const LaneRange lanes = lanes_inside<Acc<T>>(o, windows);
  return {load_lanes(values + o, lanes.first, lanes.last), load_indices<P>(indices + o, lanes)};
}

// What a pixel has after a window was asked that points `here` with `given`; `sum` is one mask in all lanes.
template <class V, class M>
FASTCV_INLINE V taken(V value, V given, M here, M sum) {
  return here ? (sum ? value + given : given) : value;
}

template <int S, class I, class T>
int64_t unpool_rows(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  constexpr bool kFlat = sizeof(I) == 8;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  const int64_t stride = S ? S : x.stride, steps = S ? S : x.phases(), width = x.input, windows = x.output;
  const int64_t kernel_w = x.kernel, padding = x.padding;
  const Coverings rows = t.rows, columns = t.columns;
  const Vec<P> lanes = iota<P>() * P(stride);
  const auto sum = Vec<P>{} < P(t.sum);
  int64_t found = 0;
  RowAt here(begin, t.channels, y.input);
  for (int64_t task = begin; task < end; ++task, ++here) {
    const int64_t plane = here.plane(), at = here.y;
    T* const row = t.to + task * width;
    Vec<P> row_found{};
    for (int64_t o = padding / stride; o * stride < padding + width; o += L) {
      Vec<A> phases[S ? S : 1];
      for (int64_t r = 0; r < steps; ++r) {
        const int64_t x0 = o * stride + r - padding;
        const Vec<P> pixel = lanes + P(x0);
        const auto inside = (pixel >= 0) & (pixel < P(width));
        Vec<A> value{};
        for (int32_t v = rows.begin[at]; v < rows.begin[at + 1]; ++v) {
          const Covering above = rows.list[v];
          const int64_t first = (plane * y.output + above.window) * windows;
          for (int32_t h = columns.begin[r]; h < columns.begin[r + 1]; ++h) {
            const Covering beside = columns.list[h];
            const Asked<T> asked = load_windows(t.from + first, indices + first, o - beside.window, windows);
            const Vec<P> wanted = kFlat ? pixel + P(at * width) : Vec<P>{} + P(above.tap * kernel_w + beside.tap);
            const auto here = (asked.index == wanted) & inside;
            value = taken(value, asked.value, here, sum);
            row_found -= (Vec<P>)here;
          }
        }
        if constexpr (S == 0) {
          for (int64_t l = 0, px = x0; l < L && px < width; ++l, px += stride)
            if (px >= 0) from_accumulate(value[l], row + px);
        } else {
          phases[r] = value;
        }
      }
      if constexpr (S != 0) store_phases<S>(phases, row, o * stride - padding, width, t.stream);
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

// The same for windows of 2 x 2 with stride 2 side by side: each is read once, for its row of the map.
template <class I, class T>
int64_t unpool_rows_2x2(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  const int64_t height = y.input, width = x.input, windows = x.output;
  const Vec<P> lanes = iota<P>() * 2;
  int64_t found = 0;
  RowAt here(begin, t.channels, height);
  for (int64_t task = begin; task < end; ++task, ++here) {
    const int64_t plane = here.plane(), at = here.y;
    if (at / 2 >= y.output) {
      memset(t.to + task * width, 0, size_t(width) * sizeof(T));
      continue;
    }
    const int64_t first = (plane * y.output + at / 2) * windows;
    const T* const values = t.from + first;
    const I* const row_indices = indices + first;
    T* const row = t.to + task * width;
    Vec<P> row_found{};
    for (int64_t o = 0; 2 * o < width; o += L) {
      const Asked<T> asked = load_windows(values, row_indices, o, windows);
      const Vec<P> left = sizeof(I) == 8 ? lanes + P(at * width + 2 * o) : Vec<P>{} + P(at % 2 * 2);
      const auto is_left = asked.index == left, is_right = asked.index == left + 1;
      const Vec<A> phases[2] = {is_left ? asked.value : Vec<A>{}, is_right ? asked.value : Vec<A>{}};
      row_found -= (Vec<P>)is_left + (Vec<P>)is_right;
      store_phases<2>(phases, row, 2 * o, width, t.stream);
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

template <class I, class T>
int64_t unpool_pixels(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using P = Position<T>;
  constexpr int L = kLanes<A>;
  const PoolAxis &y = t.geometry.y, &x = t.geometry.x;
  const auto sum = Vec<P>{} < P(t.sum);
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
              const auto here = load_indices<P>(indices + from + v * L, LaneRange{0, n}) == Vec<P>{} + P(wanted);
              const Vec<A> given = load_some(t.from + from + v * L, n);
              value[v] = taken(value[v], given, here, sum);
              row_found -= (Vec<P>)here;
            }
          }
        for (int v = 0; v < V; ++v) store_part(to + c + v * L, value[v], n, t.stream);
      });
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

// Towards windows each asks its pixels which of them it points at; returns how many found theirs.
template <int S, class I, class T>
int64_t gather_rows(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  constexpr bool kFlat = sizeof(I) == 8;
  const PoolGeometry g = t.geometry;
  const int64_t width = g.x.input, pixels = g.y.input * width;
  const Vec<P> lanes = iota<P>() * P(g.x.stride);
  int64_t found = 0;
  RowAt row(begin, t.channels, g.y.output);
  for (int64_t task = begin; task < end; ++task, ++row) {
    const int64_t oy = row.y;
    const Plane<T> map{t.from, t.images * t.channels * pixels, row.plane() * pixels, width};
    const TapRange rows = taps_inside(g.y, oy);
    Vec<P> row_found{};
    for (int64_t ox = 0; ox < g.x.output; ox += L) {
      const int n = int(min_of(L, g.x.output - ox));
      const int64_t at = task * g.x.output + ox;
      const Vec<P> index = load_indices<P>(indices + at, LaneRange{0, n}), column = lanes + P(g.x.start(ox));
      Vec<Acc<T>> value{};
      each_tap<S, 0>(g, map, rows, oy, ox, n, Acc<T>(0),
                     [&](int64_t i, int64_t j, Vec<Acc<T>> tap) FASTCV_INLINE_LAMBDA {
                       const Vec<P> x = column + P(j * g.x.dilation);
                       const int64_t row = (g.y.start(oy) + i * g.y.dilation) * width;
                       const Vec<P> wanted = kFlat ? x + P(row) : Vec<P>{} + P(i * g.x.kernel + j);
                       const auto here = (index == wanted) & (x >= 0) & (x < P(width));
                       value = here ? tap : value;
                       row_found -= (Vec<P>)here;
                     });
      store_part(t.to + at, value, n, t.stream);
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

template <class I, class T>
int64_t gather_pixels(const MaxUnpool<T>& t, const I* indices, int64_t begin, int64_t end) {
  using P = Position<T>;
  constexpr int L = kLanes<Acc<T>>;
  const PoolAxis y = t.geometry.y, x = t.geometry.x;
  int64_t found = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / y.output, oy = task % y.output;
    const TapRange rows = taps_inside(y, oy);
    Vec<P> row_found{};
    for (int64_t ox = 0; ox < x.output; ++ox) {
      const TapRange columns = taps_inside(x, ox);
      const int64_t at = (task * x.output + ox) * t.channels, pixel = y.start(oy) * x.input + x.start(ox);
      const T* const window = t.from + (image * y.input * x.input + pixel) * t.channels;
      each_channel_block<Acc<T>>(t.channels, [&](int64_t c, int n, auto vectors) FASTCV_INLINE_LAMBDA {
        for (int v = 0; v < decltype(vectors)::value; ++v) {
          const Vec<P> index = load_indices<P>(indices + at + c + v * L, LaneRange{0, n});
          Vec<Acc<T>> value{};
          for (int64_t i = rows.first; i < rows.last; ++i)
            for (int64_t j = columns.first; j < columns.last; ++j) {
              const int64_t tap = i * y.dilation * x.input + j * x.dilation;
              const auto here = index == Vec<P>{} + P(sizeof(I) == 8 ? pixel + tap : i * x.kernel + j);
              value = here ? load_some(window + tap * t.channels + c + v * L, n) : value;
              row_found -= (Vec<P>)here;
            }
          store_part(t.to + at + c + v * L, value, n, t.stream);
        }
      });
    }
    found += sum_lanes<P>(row_found);
  }
  if (t.stream) stream_end();
  return found;
}

// f(p, element, pixel) for the windows p of a plane in reading order, `pixel` -1 where the index is none of the map.
// Stops where f returns false.
template <class T, class F>
FASTCV_INLINE void each_index(const MaxUnpool<T>& t, int64_t from, int64_t step, const F& f) {
  const PoolAxis y = t.geometry.y, x = t.geometry.x;
  int32_t tap_y[256], tap_x[256];
  const int64_t taps = t.compact ? min_of(256, y.kernel * x.kernel) : 0;
  for (int64_t k = 0; k < taps; ++k) {
    tap_y[k] = int32_t(k / x.kernel * y.dilation);
    tap_x[k] = int32_t(k % x.kernel * x.dilation);
  }
  int64_t p = 0, element = from;
  for (int64_t oy = 0; oy < y.output; ++oy)
    for (int64_t ox = 0; ox < x.output; ++ox, ++p, element += step) {
      int64_t pixel = -1;
      if (t.flat) {
        if (uint64_t(t.flat[element]) < uint64_t(y.input * x.input)) pixel = t.flat[element];
      } else if (t.compact[element] < taps) {
        const int64_t py = y.start(oy) + tap_y[t.compact[element]], px = x.start(ox) + tap_x[t.compact[element]];
        if (uint64_t(py) < uint64_t(y.input) && uint64_t(px) < uint64_t(x.input)) pixel = py * x.input + px;
      }
      if (!f(p, element, pixel)) return;
    }
}

}  // namespace

template <class T>
int64_t max_unpool2d_contiguous(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  if (t.geometry.two_by_two())
    return t.flat ? unpool_rows_2x2(t, t.flat, begin, end) : unpool_rows_2x2(t, t.compact, begin, end);
  return with_strides(t.geometry.x, [&](auto columns) {
    constexpr int S = columns.stride;
    return t.flat ? unpool_rows<S>(t, t.flat, begin, end) : unpool_rows<S>(t, t.compact, begin, end);
  });
}

template <class T>
int64_t max_unpool2d_channels_last(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  return t.flat ? unpool_pixels(t, t.flat, begin, end) : unpool_pixels(t, t.compact, begin, end);
}

template <class T>
int64_t max_unpool2d_gather_contiguous(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  return with_strides(t.geometry.x, [&](auto columns) {
    constexpr int S = columns.stride;
    return t.flat ? gather_rows<S>(t, t.flat, begin, end) : gather_rows<S>(t, t.compact, begin, end);
  });
}

template <class T>
int64_t max_unpool2d_gather_channels_last(const MaxUnpool<T>& t, int64_t begin, int64_t end) {
  return t.flat ? gather_pixels(t, t.flat, begin, end) : gather_pixels(t, t.compact, begin, end);
}

template <class T>
int64_t max_unpool2d_anywhere(const MaxUnpool<T>& t, PlaneStrides map, PlaneStrides windows, int64_t image, int64_t c,
                              Acc<T>* sums) {
  const int64_t pixels = t.geometry.y.input * t.geometry.x.input;
  T* const to = t.to + image * map.image + c * map.channel;
  int64_t bad = -1;
  if (sums)
    memset(sums, 0, size_t(pixels) * sizeof(Acc<T>));
  else if (map.pixel == 1)
    memset(to, 0, size_t(pixels) * sizeof(T));
  else
    for (int64_t p = 0; p < pixels; ++p) from_accumulate(Acc<T>(0), to + p * map.pixel);
  each_index(t, image * windows.image + c * windows.channel, windows.pixel,
             [&](int64_t p, int64_t element, int64_t pixel) FASTCV_INLINE_LAMBDA {
               if (pixel < 0) {
                 bad = p;
                 return false;
               }
               if (sums)
                 sums[pixel] += to_accumulate(t.from[element]);
               else
                 to[pixel * map.pixel] = t.from[element];
               return true;
             });
  for (int64_t p = 0; sums && p < pixels; ++p) from_accumulate(sums[p], to + p * map.pixel);
  return bad;
}

template <class T>
bool max_unpool2d_add_block(const MaxUnpool<T>& t, int64_t image, int64_t c, int64_t n, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr bool kInPlace = sizeof(T) == sizeof(A);
  constexpr int L = kLanes<A>;
  const int64_t pixels = t.geometry.y.input * t.geometry.x.input;
  const int64_t windows = t.geometry.y.output * t.geometry.x.output;
  T* const to = t.to + image * pixels * t.channels + c;
  const int64_t step = kInPlace ? t.channels : n;  // from pixel to pixel
  if constexpr (kInPlace) sums = to;
  const int64_t rows = step == n ? 1 : pixels, row = step == n ? pixels * n : n;
  for (int64_t p = 0; p < rows; ++p) memset(sums + p * step, 0, size_t(row) * sizeof(A));
  for (int64_t p = 0; p < windows; ++p) {
    const int64_t element = (image * windows + p) * t.channels + c;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t pixel = t.flat[element + k];
      if (uint64_t(pixel) >= uint64_t(pixels)) return false;
      sums[pixel * step + k] += to_accumulate(t.from[element + k]);
    }
  }
  for (int64_t p = 0; !kInPlace && p < pixels; ++p)
    for (int64_t k = 0; k < n; k += L) {
      const int rest = int(min_of(L, n - k));
      store_some(to + p * t.channels + k, load_some(sums + p * n + k, rest), rest);
    }
  return true;
}

template <class T>
int64_t max_unpool2d_gather_anywhere(const MaxUnpool<T>& t, PlaneStrides map, PlaneStrides windows, int64_t image,
                                     int64_t c, int32_t* owners) {
  const T* const from = t.from + image * map.image + c * map.channel;
  const int64_t first = image * windows.image + c * windows.channel;
  int64_t bad = -1;
  if (owners)
    each_index(t, first, windows.pixel, [&](int64_t p, int64_t, int64_t pixel) FASTCV_INLINE_LAMBDA {
      if (pixel >= 0) owners[pixel] = int32_t(p);  // the last one stays
      return true;
    });
  each_index(t, first, windows.pixel, [&](int64_t p, int64_t element, int64_t pixel) FASTCV_INLINE_LAMBDA {
    if (pixel < 0) {
      bad = p;
      return false;
    }
    if (owners && owners[pixel] != int32_t(p))
      from_accumulate(Acc<T>(0), t.to + element);
    else
      t.to[element] = from[pixel * map.pixel];
    return true;
  });
  return bad;
}

#define FASTCV_INSTANTIATE(T)                                                                                         \
  template int64_t max_unpool2d_contiguous<T>(const MaxUnpool<T>&, int64_t, int64_t);                                 \
  template int64_t max_unpool2d_channels_last<T>(const MaxUnpool<T>&, int64_t, int64_t);                              \
  template int64_t max_unpool2d_gather_contiguous<T>(const MaxUnpool<T>&, int64_t, int64_t);                          \
  template int64_t max_unpool2d_gather_channels_last<T>(const MaxUnpool<T>&, int64_t, int64_t);                       \
  template int64_t max_unpool2d_anywhere<T>(const MaxUnpool<T>&, PlaneStrides, PlaneStrides, int64_t, int64_t,        \
                                            Acc<T>*);                                                                 \
  template bool max_unpool2d_add_block<T>(const MaxUnpool<T>&, int64_t, int64_t, int64_t, Acc<T>*);                   \
  template int64_t max_unpool2d_gather_anywhere<T>(const MaxUnpool<T>&, PlaneStrides, PlaneStrides, int64_t, int64_t, \
                                                   int32_t*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
