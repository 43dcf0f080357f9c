// Vectors of pooling in parts: loads and stores of some lanes, stores past the caches, shuffles, and indices, which are
// narrower or wider in memory than in registers.
#pragma once

#include "channel_block.h"
#include "positions.h"

namespace fastcv::FASTCV_ISA {

// 0, 1, 2, ... in the lanes.
template <class P>
FASTCV_INLINE Vec<P> iota() {
  Vec<P> v;
  for (int l = 0; l < kLanes<P>; ++l) v[l] = P(l);
  return v;
}

// p[l] in the lanes l of [first, last), zero in the others, whose memory is not touched.
template <class S>
FASTCV_INLINE Vec<Acc<S>> load_lanes(const S* p, int first, int last) {
  S buffer[kLanes<Acc<S>>] = {};
  memcpy(buffer + first, p + first, size_t(last - first) * sizeof(S));
  return load(buffer);
}
#if defined(__AVX512F__)
FASTCV_INLINE uint32_t lane_mask(int first, int last) { return (1u << last) - (1u << first); }
FASTCV_INLINE Vec<float> load_lanes(const float* p, int first, int last, Vec<float> others = Vec<float>{}) {
  return (Vec<float>)_mm512_mask_loadu_ps((__m512)others, __mmask16(lane_mask(first, last)), p);
}
#endif

// The lanes l of [first, last), for which o + l is one of `count`.
struct LaneRange {
  int first, last;
};
template <class A>
FASTCV_INLINE LaneRange lanes_inside(int64_t o, int64_t count) {
  const int first = int(min_of(kLanes<A>, max_of(0, -o)));
  return {first, int(max_of(first, min_of(kLanes<A>, count - o)))};
}

// A whole vector, past the caches where `stream` says so and the address allows it.
template <class S>
FASTCV_INLINE void store_through(S* p, Vec<Acc<S>> v, bool stream) {
  if constexpr (sizeof(S) == sizeof(Acc<S>))
    if (stream) return store_streaming(p, v);
  store(p, v);
}

// The first n lanes; whole vectors past the caches where `stream` says so.
template <class S>
FASTCV_INLINE void store_part(S* p, Vec<Acc<S>> v, int n, bool stream) {
  if (n == kLanes<Acc<S>>)
    store_through(p, v, stream);
  else
    store_first(p, v, n);
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

// ---- indices: bytes or int64 in memory, as wide as the values in registers ------------------------------------------

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
#if defined(__AVX512F__)
    if constexpr (sizeof(P) == 4) _mm512_mask_cvtepi32_storeu_epi8(to, __mmask16(lane_mask(0, n)), (__m512i)v);
    if constexpr (sizeof(P) == 8) _mm512_mask_cvtepi64_storeu_epi8(to, __mmask8(lane_mask(0, n)), (__m512i)v);
#else
    uint8_t bytes[kLanes<P>];
    narrow_to_bytes<P>(v, bytes);
    memcpy(to, bytes, size_t(n));
#endif
  }
}
FASTCV_INLINE void store_indices(int64_t* to, Vec<int64_t> v, int n) {
  if (n == kLanes<int64_t>)
    memcpy(to, &v, sizeof v);
  else
#if defined(__AVX512F__)
    _mm512_mask_storeu_epi64(to, __mmask8(lane_mask(0, n)), (__m512i)v);
#else
    memcpy(to, &v, size_t(n) * sizeof(int64_t));
#endif
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

// Those of the lanes of [first, last); the others hold -1, as does an int64 that is no int32.
template <class P>
FASTCV_INLINE Vec<P> load_indices(const uint8_t* from, LaneRange lanes) {
  constexpr int L = kLanes<P>;
  if (lanes.last - lanes.first == L) return widen_bytes<P>(from);
  uint8_t bytes[16] = {};
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)bytes, _mm_maskz_loadu_epi8(__mmask16(lane_mask(lanes.first, lanes.last)), from));
#else
  memcpy(bytes + lanes.first, from + lanes.first, size_t(lanes.last - lanes.first));
#endif
  const Vec<P> lane = iota<P>();
  return widen_bytes<P>(bytes) | (Vec<P>)((lane < P(lanes.first)) | (lane >= P(lanes.last)));
}
FASTCV_INLINE Vec<int64_t> load_half_of_indices(const int64_t* from, int first, int last) {
  Vec<int64_t> v = Vec<int64_t>{} - 1;
#if defined(__AVX512F__)
  return (Vec<int64_t>)_mm512_mask_loadu_epi64((__m512i)v, __mmask8(lane_mask(first, last)), from);
#else
  if (last - first == kLanes<int64_t>)
    memcpy(&v, from, sizeof v);
  else
    memcpy(reinterpret_cast<char*>(&v) + size_t(first) * sizeof(int64_t), from + first,
           size_t(last - first) * sizeof(int64_t));
  return v;
#endif
}
template <class P>
FASTCV_INLINE Vec<P> load_indices(const int64_t* from, LaneRange lanes) {
  if constexpr (sizeof(P) == 8) {
    return load_half_of_indices(from, lanes.first, lanes.last);
  } else {
    constexpr int H = kLanes<int64_t>;
    const int low_first = int(min_of(lanes.first, H)), high_last = int(max_of(lanes.last - H, 0));
    Vec<int64_t> low = load_half_of_indices(from, low_first, int(min_of(lanes.last, H)));
    Vec<int64_t> high = load_half_of_indices(from + H, int(min_of(high_last, max_of(lanes.first - H, 0))), high_last);
    low = (low >> 31) == 0 ? low : Vec<int64_t>{} - 1;
    high = (high >> 31) == 0 ? high : Vec<int64_t>{} - 1;
    return even_lanes((Vec<int32_t>)low, (Vec<int32_t>)high, LaneIndices<int32_t>{});  // the lower halves
  }
}

}  // namespace fastcv::FASTCV_ISA
