// Sampling of channels at taps: rows (channel, kernel element) of a panel of columns.
#pragma once

#include "deform_conv2d_taps.h"

namespace fastcv::FASTCV_ISA {
namespace {

// ---- four lanes: two samples of a plane, each a pair of neighbours --------------------------------------------------

template <class A>
using Quad = typename VecN<A, 4>::type;

template <class A>
FASTCV_INLINE Quad<A> load4(const A* p) {
  Quad<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
FASTCV_INLINE void store4(A* p, Quad<A> v) {
  memcpy(p, &v, sizeof v);
}

FASTCV_INLINE Quad<float> fma4(Quad<float> a, Quad<float> b, Quad<float> c) {
#if defined(__FMA__)
  return (Quad<float>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON)
  return (Quad<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FASTCV_INLINE Quad<double> fma4(Quad<double> a, Quad<double> b, Quad<double> c) {
#if defined(__FMA__)
  return (Quad<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// [a[0], a[1], b[0], b[1]].
FASTCV_INLINE Quad<float> load_pairs(const float* a, const float* b) {
#if defined(__SSE2__)
  return (Quad<float>)_mm_loadh_pi(_mm_castpd_ps(_mm_load_sd((const double*)a)), (const __m64*)b);
#else
  VecN<float, 2>::type first, second;
  memcpy(&first, a, sizeof first);
  memcpy(&second, b, sizeof second);
  return __builtin_shufflevector(first, second, 0, 1, 2, 3);
#endif
}
FASTCV_INLINE Quad<double> load_pairs(const double* a, const double* b) {
  VecN<double, 2>::type first, second;
  memcpy(&first, a, sizeof first);
  memcpy(&second, b, sizeof second);
  return __builtin_shufflevector(first, second, 0, 1, 2, 3);
}
FASTCV_INLINE Quad<float> load_pairs(const bfloat16_t* a, const bfloat16_t* b) {
  uint32_t first, second;
  memcpy(&first, a, 4);
  memcpy(&second, b, 4);
  const VecN<uint32_t, 4>::type bits = {first << 16, first & 0xffff0000u, second << 16, second & 0xffff0000u};
  return (Quad<float>)bits;
}
FASTCV_INLINE Quad<float> load_pairs(const half_t* a, const half_t* b) {
#if defined(__F16C__)
  int32_t first, second;
  memcpy(&first, a, 4);
  memcpy(&second, b, 4);
  return (Quad<float>)_mm_cvtph_ps(_mm_insert_epi32(_mm_cvtsi32_si128(first), second, 1));
#else
  return Quad<float>{to_accumulate(a[0]), to_accumulate(a[1]), to_accumulate(b[0]), to_accumulate(b[1])};
#endif
}

template <class A>
FASTCV_INLINE Quad<A> keep(Quad<A> v, const typename PairTaps<A>::Bits* bits) {
  typedef typename VecN<typename PairTaps<A>::Bits, 4>::type Mask;
  Mask mask;
  memcpy(&mask, bits, sizeof mask);
  return (Quad<A>)((Mask)v & mask);
}

// Sums of neighbours: [a0 + a1, a2 + a3, b0 + b1, b2 + b3].
template <class A>
FASTCV_INLINE Quad<A> add_pairs(Quad<A> a, Quad<A> b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}

// The numbers that four samples of one plane read.
template <class A>
struct FourSamples {
  Quad<A> upper01, upper23, lower01, lower23;
};

template <bool kKeep, class T, class A>
FASTCV_INLINE FourSamples<A> load_samples(const T* plane, int64_t row_step, const PairTaps<A>& taps, int i) {
  const T *p0 = plane + taps.base[i], *p1 = plane + taps.base[i + 1], *p2 = plane + taps.base[i + 2],
          *p3 = plane + taps.base[i + 3];
  FourSamples<A> s = {load_pairs(p0, p1), load_pairs(p2, p3), load_pairs(p0 + row_step, p1 + row_step),
                      load_pairs(p2 + row_step, p3 + row_step)};
  if constexpr (kKeep) {
    s.upper01 = keep<A>(s.upper01, taps.keep_upper + 2 * i);
    s.upper23 = keep<A>(s.upper23, taps.keep_upper + 2 * i + 4);
    s.lower01 = keep<A>(s.lower01, taps.keep_lower + 2 * i);
    s.lower23 = keep<A>(s.lower23, taps.keep_lower + 2 * i + 4);
  }
  return s;
}

// Weights of the numbers, in the same order.
template <class A>
FASTCV_INLINE FourSamples<A> load_weights(const A* upper, const A* lower, int i) {
  return {load4(upper + 2 * i), load4(upper + 2 * i + 4), load4(lower + 2 * i), load4(lower + 2 * i + 4)};
}

template <class A>
FASTCV_INLINE Quad<A> weigh(const FourSamples<A>& s, const FourSamples<A>& weight) {
  return add_pairs<A>(fma4(s.lower01, weight.lower01, s.upper01 * weight.upper01),
                      fma4(s.lower23, weight.lower23, s.upper23 * weight.upper23));
}

// rows[c * row_step] = channel c of `planes` sampled, for all pixels of the panel and channels c < n.
template <bool kKeep, class T, class A>
void sample_planes(const T* planes, int64_t plane_step, int64_t n, int64_t pair_step, const PairTaps<A>& taps, A* rows,
                   int64_t row_step) {
  for (int i = 0; i < kPanel<A>; i += 4) {
    const FourSamples<A> weight = load_weights(taps.upper, taps.lower, i);
    const T* plane = planes;
    A* row = rows + i;
    for (int64_t c = 0; c < n; ++c, plane += plane_step, row += row_step)
      store4(row, weigh(load_samples<kKeep>(plane, pair_step, taps, i), weight));
  }
}

// ---- channels-last: one vector of channels at each corner -----------------------------------------------------------

template <bool kFull, class T>
FASTCV_INLINE Vec<accumulate_t<T>> load_channels(const T* p, int n) {
  if constexpr (kFull)
    return load(p);
  else
    return load_first(p, n);
}

template <bool kFull, class T, class A>
FASTCV_INLINE Vec<A> sample_channels(const T* channel, int n, const int64_t* stride, const CornerTaps<A>& taps, int i) {
  const int64_t upper = taps.base[i], lower = upper + stride[2];
  const auto corner = [&](int64_t at) { return load_channels<kFull>(channel + at, n); };
  const auto weight = [&](int which) { return broadcast(taps.weight[which][i]); };
  const int32_t valid = taps.valid[i];
  Vec<A> sum = {};
  if (__builtin_expect(valid == kAllCorners, 1)) {
    sum = corner(upper) * weight(0);
    sum = fma(corner(upper + stride[3]), weight(1), sum);
    sum = fma(corner(lower), weight(2), sum);
    return fma(corner(lower + stride[3]), weight(3), sum);
  }
  if (valid & kUpperLeft) sum = corner(upper) * weight(0);
  if (valid & kUpperRight) sum = fma(corner(upper + stride[3]), weight(1), sum);
  if (valid & kLowerLeft) sum = fma(corner(lower), weight(2), sum);
  if (valid & kLowerRight) sum = fma(corner(lower + stride[3]), weight(3), sum);
  return sum;
}

template <bool kFull, class T, class A>
FASTCV_INLINE void sample_square(const T* channel, int n, const int64_t* stride, const CornerTaps<A>& taps, int first,
                                 A* rows, int64_t row_step) {
  constexpr int L = kLanes<A>;
  Vec<A> square[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) square[i] = sample_channels<kFull>(channel, n, stride, taps, first + i);
  transpose(square);
  if constexpr (kFull) {
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) store(rows + c * row_step, square[c]);
  } else {
    Vec<A> copy[L];
    memcpy(copy, square, sizeof copy);
    for (int c = 0; c < n; ++c) store(rows + c * row_step, copy[c]);
  }
}

// The same as sample_planes, for channels that lie side by side.
template <class T, class A>
void sample_channels_last(const T* channels, int64_t n, const int64_t* stride, const CornerTaps<A>& taps, A* rows,
                          int64_t row_step) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < n; c += L)
    for (int half = 0; half < kPanel<A>; half += L) {
      if (n - c >= L)
        sample_square<true>(channels + c, L, stride, taps, half, rows + c * row_step + half, row_step);
      else
        sample_square<false>(channels + c, int(n - c), stride, taps, half, rows + c * row_step + half, row_step);
    }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
