// A small vector type for kernels that are compiled once per instruction set.
//
// Arithmetic, comparisons and ?: come from the compiler's vector extension (GCC, Clang), so that one source serves
// SSE2, AVX2, AVX-512 and NEON. Only what the extension lacks is written here: loads and stores that convert from and
// to the storage types, fused multiply-add, minimum, maximum and tests over all lanes.
//
// Everything lives in the namespace of its instruction set, and no standard container header is included: an inline
// function compiled for AVX-512 and shared with other files could be the copy that the linker keeps, and older
// processors would crash in it.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(FASTCV_X86)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef FASTCV_ISA
#error "compile this file through fastcv_add_kernels() in CMakeLists.txt, which defines FASTCV_ISA"
#endif

#include "scalars.h"

#define FASTCV_INLINE inline __attribute__((always_inline))
#define FASTCV_INLINE_LAMBDA __attribute__((always_inline))

namespace fastcv {

namespace FASTCV_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// <algorithm>'s could be copies for another instruction set.
FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCV_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTCV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// The integer as wide as A: comparisons of A are made of it, and one comparison's mask selects from vectors of both.
template <class A>
struct SameSizeOf {
  using type = int32_t;
};
template <>
struct SameSizeOf<double> {
  using type = int64_t;
};
template <class A>
using SameSize = typename SameSizeOf<A>::type;

// A vector of L lanes of T, whatever its width in bytes.
template <class T, int L>
struct VecN {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};

template <class T>
FASTCV_INLINE Vec<T> broadcast(T value) {
  // x - 0 is x for every x and costs nothing; 0 + x would turn -0 into 0, so it stays an addition.
  return value - Vec<T>{};
}

// ---- vector loads and stores: storage type in memory, accumulate type in the register -------------------------------

FASTCV_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTCV_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTCV_INLINE Vec<float> load(const bfloat16_t* p) {
  typename VecN<uint16_t, kLanes<float>>::type raw;
  memcpy(&raw, p, sizeof raw);
  Vec<uint32_t> bits = __builtin_convertvector(raw, Vec<uint32_t>) << 16;
  Vec<float> v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
FASTCV_INLINE Vec<float> load(const half_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_accumulate(p[i]);
  return v;
#endif
}

FASTCV_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
FASTCV_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }
FASTCV_INLINE void store(bfloat16_t* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &rounded, sizeof rounded);
#else
  Vec<uint32_t> bits;
  memcpy(&bits, &v, sizeof v);
  Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = (Vec<uint32_t>)(v != v);
  rounded = (rounded & ~nan) | (nan & 0x7fc0);
  auto narrow = __builtin_convertvector(rounded, typename VecN<uint16_t, kLanes<float>>::type);
  memcpy(p, &narrow, sizeof narrow);
#endif
}
FASTCV_INLINE void store(half_t* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_accumulate(v[i], p + i);
#endif
}

// The first n lanes; the others are zero when loaded and left alone in memory when stored.
template <class S>
FASTCV_INLINE Vec<accumulate_t<S>> load_first(const S* p, int n) {
  S buffer[kLanes<accumulate_t<S>>] = {};
  memcpy(buffer, p, n * sizeof(S));
  return load(buffer);
}
template <class S>
FASTCV_INLINE void store_first(S* p, Vec<accumulate_t<S>> v, int n) {
  S buffer[kLanes<accumulate_t<S>>];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(S));
}
#if defined(__AVX512F__)
FASTCV_INLINE Vec<float> load_first(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTCV_INLINE void store_first(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
#endif

// A whole vector, or the first n lanes where there are fewer.
template <class S>
FASTCV_INLINE Vec<accumulate_t<S>> load_some(const S* p, int64_t n) {
  return n >= kLanes<accumulate_t<S>> ? load(p) : load_first(p, int(n));
}
template <class S>
FASTCV_INLINE void store_some(S* p, Vec<accumulate_t<S>> v, int64_t n) {
  if (n >= kLanes<accumulate_t<S>>)
    store(p, v);
  else
    store_first(p, v, int(n));
}

// A vector past the caches, for results larger than them: a plain store would first read its line from memory. Ordered
// with other threads' reads after stream_end(). As usual where the address is not aligned to the vector.
template <class A>
FASTCV_INLINE void store_streaming(A* p, Vec<A> v) {
#if defined(__SSE2__)
  if ((uintptr_t(p) & (kVectorBytes - 1)) == 0) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
    _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
    return;
  }
#endif
  store(p, v);
}
// The same for a copy of whole, aligned lines; others are copied as usual.
FASTCV_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
  if (((uintptr_t(to) | uintptr_t(bytes)) & 63) != 0) {
    memcpy(to, from, size_t(bytes));
    return;
  }
  for (int64_t at = 0; at < bytes; at += kVectorBytes)
    store_streaming(reinterpret_cast<float*>(static_cast<char*>(to) + at),
                    load(reinterpret_cast<const float*>(static_cast<const char*>(from) + at)));
}
FASTCV_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- arithmetic that the vector extension lacks ---------------------------------------------------------------------

// a * b + c: one rounding where the instruction set has FMA, two on the SSE2 baseline.
FASTCV_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FASTCV_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The second operand where either is NaN, as the x86 instructions have it.
template <class V>
FASTCV_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FASTCV_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

// True where any lane of a comparison's result is set.
template <class M>
FASTCV_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  uint64_t words[kVectorBytes / 8];
  memcpy(words, &mask, sizeof mask);
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// One bit for each lane of T of a comparison's result, the first lane lowest.
template <class T, class M>
FASTCV_INLINE uint32_t lane_bits(M mask) {
#if defined(__AVX512F__)
  return sizeof(T) == 4 ? uint32_t(_mm512_movepi32_mask((__m512i)mask)) : uint32_t(_mm512_movepi64_mask((__m512i)mask));
#elif defined(__AVX2__)
  return sizeof(T) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  return sizeof(T) == 4 ? _mm_movemask_ps((__m128)mask) : _mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

}  // namespace FASTCV_ISA
}  // namespace fastcv
