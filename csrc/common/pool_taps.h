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
// Lanes of a and b in turn; the half of the result from lane `First` of them on.
template <int First, class V, int... J>
FASTCV_INLINE V in_turn(V a, V b, Indices<J...>) {
  return __builtin_shufflevector(a, b, (First + J / 2 + (J & 1) * int(sizeof...(J)))...);
}
template <class A>
using LaneIndices = typename MakeIndices<kLanes<A>>::type;

// p[0], p[stride], p[2 stride], ... Stride 2 reads one element more than it needs; S = 0 stands for any other stride.
template <int S, class T>
FASTCV_INLINE Vec<Acc<T>> load_strided(const T* p, int64_t stride) {
  constexpr int L = kLanes<Acc<T>>;
  if constexpr (S == 1) {
    return load(p);
  } else if constexpr (S == 2) {
    return even_lanes(load(p), load(p + L), LaneIndices<Acc<T>>{});
  } else {
    Vec<Acc<T>> v;
    for (int l = 0; l < L; ++l) v[l] = to_accumulate(p[l * stride]);
    return v;
  }
}

// copy[i] = row[start + i] for i < count, `outside` where that is not in [0, size).
template <class T, class A>
FASTCV_INLINE void copy_clipped(const T* row, int64_t size, int64_t start, int64_t count, A outside, A* copy) {
  const int64_t first = least(count, most(0, -start)), last = most(first, least(count, size - start));
  for (int64_t i = 0; i < first; ++i) copy[i] = outside;
  for (int64_t i = first; i < last; ++i) copy[i] = to_accumulate(row[start + i]);
  for (int64_t i = last; i < count; ++i) copy[i] = outside;
}

// f(i, j, values) for the taps of windows ox, ox + 1, ... of one output row, a lane for each; lanes whose tap lies left
// or right of the map hold `outside`. Rows above and below are left out. Blocks at the ends of a row go through a copy.
template <int S, class T, class F>
FASTCV_INLINE void each_tap(const PoolGeometry& g, const T* plane, int64_t stride_y, TapRange rows, int64_t oy,
                            int64_t ox, Acc<T> outside, const F& f) {
  constexpr int64_t kCopied = 512;
  const PoolAxis& x = g.x;
  const int64_t x0 = x.start(ox), reach = (x.kernel - 1) * x.dilation + kLanes<Acc<T>> * x.stride;
  const T* const first_row = plane + g.y.start(oy) * stride_y;
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const T* const row = first_row + i * g.y.dilation * stride_y;
    if (x0 >= 0 && x0 + reach <= x.input) {
      for (int64_t j = 0; j < x.kernel; ++j) f(i, j, load_strided<S>(row + x0 + j * x.dilation, x.stride));
    } else if (reach <= kCopied) {
      Acc<T> copy[kCopied];
      copy_clipped(row, x.input, x0, reach, outside, copy);
      for (int64_t j = 0; j < x.kernel; ++j) f(i, j, load_strided<S>(copy + j * x.dilation, x.stride));
    } else {
      for (int64_t j = 0; j < x.kernel; ++j) {
        Vec<Acc<T>> v;
        for (int l = 0; l < kLanes<Acc<T>>; ++l) {
          const int64_t at = x0 + l * x.stride + j * x.dilation;
          v[l] = at >= 0 && at < x.input ? to_accumulate(row[at]) : outside;
        }
        f(i, j, v);
      }
    }
  }
}

// f(integral stride): 1, 2 or, for all others, 0.
template <int S>
struct Stride {
  static constexpr int value = S;
};
template <class F>
FASTCV_INLINE auto with_stride(int64_t stride, const F& f) {
  return stride == 1 ? f(Stride<1>{}) : stride == 2 ? f(Stride<2>{}) : f(Stride<0>{});
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

// ---- indices: bytes or int64 in memory, as wide as the values in registers --------------------------------------------

template <class P, class W>
FASTCV_INLINE W halves_of(Vec<P> v, bool upper) {  // int32 lanes to int64 lanes
  typename VecN<P, kLanes<P> / 2>::type half;
  memcpy(&half, reinterpret_cast<const char*>(&v) + (upper ? sizeof half : 0), sizeof half);
  return __builtin_convertvector(half, W);
}

template <class P>
FASTCV_INLINE void store_indices(uint8_t* to, Vec<P> v, int n) {
  const auto bytes = __builtin_convertvector(v, typename VecN<uint8_t, kLanes<P>>::type);
  if (n == kLanes<P>)
    memcpy(to, &bytes, kLanes<P>);
  else
    memcpy(to, &bytes, size_t(n));
}
FASTCV_INLINE void store_indices(int64_t* to, Vec<int64_t> v, int n) {
  if (n == kLanes<int64_t>)
    memcpy(to, &v, sizeof v);
  else
    memcpy(to, &v, size_t(n) * sizeof(int64_t));
}
FASTCV_INLINE void store_indices(int64_t* to, Vec<int32_t> v, int n) {
  constexpr int H = kLanes<int64_t>;
  store_indices(to, halves_of<int32_t, Vec<int64_t>>(v, false), n < H ? n : H);
  if (n > H) store_indices(to + H, halves_of<int32_t, Vec<int64_t>>(v, true), n - H);
}

// The first n; the other lanes hold -1, as does an int64 that is no int32.
template <class P>
FASTCV_INLINE Vec<P> load_indices(const uint8_t* from, int n) {
  constexpr int L = kLanes<P>;
  typename VecN<uint8_t, L>::type bytes;
  if (n == L) {
    memcpy(&bytes, from, L);
    return __builtin_convertvector(bytes, Vec<P>);
  }
  Vec<P> v = Vec<P>{} - 1;
  for (int l = 0; l < n; ++l) v[l] = from[l];
  return v;
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
    const auto a = __builtin_convertvector(low, typename VecN<int32_t, H>::type);
    const auto b = __builtin_convertvector(high, typename VecN<int32_t, H>::type);
    Vec<int32_t> v;
    memcpy(&v, &a, sizeof a);
    memcpy(reinterpret_cast<char*>(&v) + sizeof a, &b, sizeof b);
    return v;
  }
}

}  // namespace fastcv::FASTCV_ISA
