// What the kernels of pooling share: windows of a contiguous row in vectors, one lane for each window, and the maximum
// that lets NaN win.
#pragma once

#include "channel_block.h"
#include "pool_window.h"

namespace fastcv::FASTCV_ISA {

template <class T>
using Acc = accumulate_t<T>;

// Positions have as many bits as values, so that one comparison's mask selects both.
template <class A>
struct PositionOf {
  using type = int32_t;
};
template <>
struct PositionOf<double> {
  using type = int64_t;
};
template <class T>
using Position = typename PositionOf<Acc<T>>::type;

FASTCV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCV_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Where a value takes the place of the greatest so far: it is greater, or NaN.
template <class V>
FASTCV_INLINE auto takes_over(V value, V greatest) {
  return (value > greatest) | (value != value);
}

// Taps [first, last) of window o that lie inside the input.
struct TapRange {
  int64_t first, last;
};
FASTCV_INLINE TapRange taps_inside(const PoolAxis& axis, int64_t o) {
  const int64_t start = axis.start(o), d = axis.dilation, below = axis.input - start;
  if (d == 1) return {start < 0 ? -start : 0, least(axis.kernel, below)};
  return {start < 0 ? (d - 1 - start) / d : 0, below > 0 ? least(axis.kernel, (below + d - 1) / d) : 0};
}

// 0, 1, 2, ... in the lanes.
template <class P>
FASTCV_INLINE Vec<P> iota() {
  Vec<P> v;
  for (int l = 0; l < kLanes<P>; ++l) v[l] = P(l);
  return v;
}

template <class S>
FASTCV_INLINE auto load_n(const S* p, int n) {
  return n == kLanes<Acc<S>> ? load(p) : load_first(p, n);
}
template <class S>
FASTCV_INLINE void store_n(S* p, Vec<Acc<S>> v, int n) {
  if (n == kLanes<Acc<S>>)
    store(p, v);
  else
    store_first(p, v, n);
}

// A whole vector, past the caches where `stream` says so and the address allows it.
template <class S>
FASTCV_INLINE void store_through(S* p, Vec<Acc<S>> v, bool stream) {
#if defined(__SSE2__)
  if constexpr (sizeof(S) == sizeof(Acc<S>)) {
    if (stream && (uintptr_t(p) & (kVectorBytes - 1)) == 0) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
      _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
      _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
      return;
    }
  }
#endif
  store(p, v);
}

template <class V, int... J>
FASTCV_INLINE V even_lanes(V a, V b, Indices<J...>) {
  return __builtin_shufflevector(a, b, (2 * J)...);
}
template <class V, int... J>
FASTCV_INLINE V odd_lanes(V a, V b, Indices<J...>) {
  return __builtin_shufflevector(a, b, (2 * J + 1)...);
}
// The even lanes of a, then the odd ones of b.
template <class V, int... J>
FASTCV_INLINE V even_then_odd_lanes(V a, V b, Indices<J...>) {
  return __builtin_shufflevector(a, b, (2 * J < int(sizeof...(J)) ? 2 * J : 2 * J + 1)...);
}
// Lanes of a and b in turn; the half of the result from lane `First` of them on.
template <int First, class V, int... J>
FASTCV_INLINE V in_turn(V a, V b, Indices<J...>) {
  return __builtin_shufflevector(a, b, (First + J / 2 + (J & 1) * int(sizeof...(J)))...);
}
template <class A>
using LaneIndices = typename MakeIndices<kLanes<A>>::type;

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

// copy[i] = row[start + i] for i < count, `outside` where that is not in [0, size).
// Writes whole vectors, up to one behind the last.
template <class T, class A>
FASTCV_INLINE void copy_clipped(const T* row, int64_t size, int64_t start, int64_t count, A outside, A* copy) {
  constexpr int L = kLanes<A>;
  const int64_t first = least(count, most(0, -start)), last = most(first, least(count, size - start));
  for (int64_t i = 0; i < count; i += L) store(copy + i, broadcast(outside));
  int64_t i = first;
  for (; i + L <= last; i += L) store(copy + i, load(row + start + i));
  if (i < last) store_first(copy + i, load_first(row + start + i, int(last - i)), int(last - i));
}

// f(i, j, values) for rows i of the taps of windows side by side, the first of which starts at `window`. K is the number of
// taps in a row where the compiler shall know it, for windows without dilation; else 0.
template <int S, int K, class T, class F>
FASTCV_INLINE void each_tap_of(const T* window, int64_t row_stride, TapRange rows, const PoolAxis& x, const F& f) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t kernel = K ? K : x.kernel, dilation = K ? 1 : x.dilation, stride = x.stride;
  const T* row = window + rows.first * row_stride;
  for (int64_t i = rows.first; i < rows.last; ++i, row += row_stride) {
    int64_t j = 0;
    if constexpr (S == 2 && K != 0) {  // two taps are the even and the odd lanes of the same two loads
      for (; j + 1 < kernel; j += 2) {
        const Vec<Acc<T>> a = load(row + j), b = load(row + j + L);
        f(i, j, even_lanes(a, b, LaneIndices<Acc<T>>{}));
        f(i, j + 1, odd_lanes(a, b, LaneIndices<Acc<T>>{}));
      }
    }
    for (; j < kernel; ++j) f(i, j, load_strided<S>(row + j * dilation, stride));
  }
}

constexpr int64_t kCopiedTaps = 4096;  // of a block of windows at the end of a row

// The pixels of a block of windows, `outside` where there are none; returns how many a row has.
template <class T>
__attribute__((noinline)) int64_t copy_block(const PoolGeometry& g, const T* plane, int64_t stride_y, TapRange rows,
                                             int64_t oy, int64_t x0, Acc<T> outside, Acc<T>* copy) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const int64_t width = (g.x.kernel - 1) * g.x.dilation + (L - 1) * g.x.stride + 1, pitch = (width + L - 1) / L * L;
  for (int64_t i = rows.first; i < rows.last; ++i)
    copy_clipped(plane + (g.y.start(oy) + i * g.y.dilation) * stride_y, g.x.input, x0, width, outside, copy + i * pitch);
  return pitch;
}

// f(i, j, values) for the taps of windows ox, ox + 1, ... of one output row, a lane for each; lanes whose tap lies left
// or right of the map hold `outside`. Rows above and below are left out. Blocks at the ends of a row go through a copy.
template <int S, int K, class T, class F>
FASTCV_INLINE void each_tap(const PoolGeometry& g, const T* plane, int64_t stride_y, TapRange rows, int64_t oy,
                            int64_t ox, Acc<T> outside, const F& f) {
  const PoolAxis& x = g.x;
  const int64_t x0 = x.start(ox), reach = (x.kernel - 1) * x.dilation + (kLanes<Acc<T>> - 1) * x.stride + 1;
  if (__builtin_expect(x0 >= 0 && x0 + reach <= x.input, 1)) {
    each_tap_of<S, K>(plane + g.y.start(oy) * stride_y + x0, g.y.dilation * stride_y, rows, x, f);
  } else if (rows.last * (reach + kLanes<Acc<T>>) <= kCopiedTaps) {
    Acc<T> copy[kCopiedTaps];
    const int64_t width = copy_block(g, plane, stride_y, rows, oy, x0, outside, copy);
    each_tap_of<S, K>(copy, width, rows, x, f);
  } else {
    for (int64_t i = rows.first; i < rows.last; ++i)
      for (int64_t j = 0; j < x.kernel; ++j) {
        const T* const row = plane + (g.y.start(oy) + i * g.y.dilation) * stride_y;
        Vec<Acc<T>> v;
        for (int l = 0; l < kLanes<Acc<T>>; ++l) {
          const int64_t at = x0 + l * x.stride + j * x.dilation;
          v[l] = at >= 0 && at < x.input ? to_accumulate(row[at]) : outside;
        }
        f(i, j, v);
      }
  }
}

// Asks for `rows` rows of n elements that windows two rows of output below will read. Processors foresee one row, not that
// the next ones take turns.
template <class T>
FASTCV_INLINE void prefetch_rows(const T* first, int64_t row_stride, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < least(rows, 4); ++i)
    for (int64_t at = 0; at < n; at += 64 / int64_t(sizeof(T))) __builtin_prefetch(first + i * row_stride + at);
}

// f(shape) with what the compiler shall know of the columns: the stride where it is 1 or 2, and the kernel for the common
// ones; 0 for all others.
template <int S, int K>
struct Columns {
  static constexpr int stride = S, kernel = K;
};
template <class F>
FASTCV_INLINE auto with_columns(const PoolAxis& x, const F& f) {
  const bool dense = x.dilation == 1;
  if (x.stride == 2) {
    if (dense && x.kernel == 2) return f(Columns<2, 2>{});
    if (dense && x.kernel == 3) return f(Columns<2, 3>{});
    return f(Columns<2, 0>{});
  }
  if (x.stride == 1) return dense && x.kernel == 3 ? f(Columns<1, 3>{}) : f(Columns<1, 0>{});
  return f(Columns<0, 0>{});
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
      const int64_t first = most(0, -x), last = least(L, width - x);
      if (first < last) memcpy(row + x + first, copy + first, size_t(last - first) * sizeof(T));
    }
  }
}

// ---- indices: bytes or int64 in memory, as wide as the values in registers --------------------------------------------

// What __builtin_convertvector leaves to single lanes is written out for x86.
template <class P>
FASTCV_INLINE Vec<P> widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == 4) return (Vec<P>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  if constexpr (sizeof(P) == 8) return (Vec<P>)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__AVX2__)
  if constexpr (sizeof(P) == 4) return (Vec<P>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  if constexpr (sizeof(P) == 8) return (Vec<P>)_mm256_cvtepu8_epi64(_mm_loadu_si32(from));
#else
  typename VecN<uint8_t, kLanes<P>>::type bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<P>);
#endif
}
template <class P>
FASTCV_INLINE void narrow_to_bytes(Vec<P> v, uint8_t* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == 4) _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
  if constexpr (sizeof(P) == 8) _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8((__m512i)v));
#else
#if defined(__SSE2__)
  if constexpr (sizeof(P) == 4) {
    __m128i parts[2];
    memcpy(parts, &v, sizeof v);
    if constexpr (sizeof v == 16) parts[1] = parts[0];
    const __m128i words = _mm_packs_epi32(parts[0], parts[1]), bytes = _mm_packus_epi16(words, words);
    memcpy(to, &bytes, kLanes<P>);
    return;
  }
#endif
  for (int l = 0; l < kLanes<P>; ++l) to[l] = uint8_t(v[l]);
#endif
}

template <class P>
FASTCV_INLINE void store_indices(uint8_t* to, Vec<P> v, int n) {
  if (n == kLanes<P>) {
    narrow_to_bytes<P>(v, to);
  } else {
    uint8_t bytes[kLanes<P>];
    narrow_to_bytes<P>(v, bytes);
    memcpy(to, bytes, size_t(n));
  }
}
FASTCV_INLINE void store_indices(int64_t* to, Vec<int64_t> v, int n) {
  if (n == kLanes<int64_t>)
    memcpy(to, &v, sizeof v);
  else
    memcpy(to, &v, size_t(n) * sizeof(int64_t));
}
FASTCV_INLINE void store_indices(int64_t* to, Vec<int32_t> v, int n) {
  constexpr int H = kLanes<int64_t>;
  typename VecN<int32_t, H>::type half[2];
  memcpy(half, &v, sizeof v);
  for (int h = 0; h < 2 && n > h * H; ++h) {
#if defined(__AVX512F__)
    const Vec<int64_t> wide = (Vec<int64_t>)_mm512_cvtepi32_epi64((__m256i)half[h]);
#elif defined(__AVX2__)
    const Vec<int64_t> wide = (Vec<int64_t>)_mm256_cvtepi32_epi64((__m128i)half[h]);
#else
    const Vec<int64_t> wide = __builtin_convertvector(half[h], Vec<int64_t>);
#endif
    store_indices(to + h * H, wide, n - h * H < H ? n - h * H : H);
  }
}

// The first n; the other lanes hold -1, as does an int64 that is no int32.
template <class P>
FASTCV_INLINE Vec<P> load_indices(const uint8_t* from, int n) {
  if (n == kLanes<P>) return widen_bytes<P>(from);
  uint8_t bytes[kLanes<P>];
  memcpy(bytes, from, size_t(n));
  Vec<P> wide = widen_bytes<P>(bytes);
#if defined(__AVX512F__)
  asm("" : "+v"(wide));  // GCC 12 makes conversion and selection one masked instruction, which it fails to write down
#endif
  return iota<P>() < P(n) ? wide : Vec<P>{} - 1;
}
template <class P>
FASTCV_INLINE Vec<P> load_indices(const int64_t* from, int n) {
  if constexpr (sizeof(P) == 8) {
    Vec<P> v = Vec<P>{} - 1;
    memcpy(&v, from, size_t(n) * sizeof(P));
    return v;
  } else {
    constexpr int H = kLanes<int64_t>;
    Vec<int64_t> low = Vec<int64_t>{} - 1, high = low;
    if (n == 2 * H) {
      memcpy(&low, from, sizeof low);
      memcpy(&high, from + H, sizeof high);
    } else {
      memcpy(&low, from, size_t(n < H ? n : H) * sizeof(int64_t));
      if (n > H) memcpy(&high, from + H, size_t(n - H) * sizeof(int64_t));
    }
    low = (low >> 31) == 0 ? low : Vec<int64_t>{} - 1;
    high = (high >> 31) == 0 ? high : Vec<int64_t>{} - 1;
    return even_lanes((Vec<int32_t>)low, (Vec<int32_t>)high, LaneIndices<int32_t>{});  // the lower halves
  }
}

}  // namespace fastcv::FASTCV_ISA
