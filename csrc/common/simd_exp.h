// exp of a vector, to about one unit in the last place, subnormal results included.
#pragma once

#include "simd.h"

namespace fastcv::FASTCV_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int kDegree = 7, kMantissaBits = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;                                   // adding it rounds to an integer
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;   // n * kLn2High is exact
  static constexpr float kLowest = -105, kHighest = 89;                        // beyond them 0 and infinity
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int kDegree = 13, kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLowest = -746, kHighest = 710;
};

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where the Taylor polynomial is accurate to the last place.
template <class T>
FASTCV_INLINE Vec<T> exp(Vec<T> x, T) {
  using C = ExpConstants<T>;
  using Bits = Vec<typename C::Int>;
  const Vec<T> bounded = min(max(x, broadcast(C::kLowest)), broadcast(C::kHighest));
  const Vec<T> rounded = bounded * T(0x1.71547652b82fep0) + C::kRound, n = rounded - C::kRound;
  const Vec<T> r = fma(n, broadcast(-C::kLn2Low), fma(n, broadcast(-C::kLn2High), bounded));
  T factorial[C::kDegree + 1];
  factorial[0] = 1;
  for (int k = 1; k <= C::kDegree; ++k) factorial[k] = factorial[k - 1] * k;
  Vec<T> y = broadcast(1 / factorial[C::kDegree]);
  for (int k = C::kDegree - 1; k >= 0; --k) y = fma(y, r, broadcast(1 / factorial[k]));
  // 2^n in two factors: one alone would overflow or underflow before the product does.
  const Vec<T> round = broadcast(C::kRound);
  Bits high, base;
  memcpy(&high, &rounded, sizeof high);
  memcpy(&base, &round, sizeof base);
  const Bits e = high - base, half = e >> 1;
  const Bits first = (half + C::kBias) << C::kMantissaBits, second = (e - half + C::kBias) << C::kMantissaBits;
  Vec<T> a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  y = y * a * b;
  return x == x ? y : x;
}

// 1 / x for x in [1, 1e38]: an estimate and Newton's steps, where a division would take as long as a dozen products.
FASTCV_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return fma(y, fma(-x, y, broadcast(1.0f)), y);
#elif defined(__AVX2__)
  Vec<float> y = (Vec<float>)_mm256_rcp_ps((__m256)x);
  y = fma(y, fma(-x, y, broadcast(1.0f)), y);
  return fma(y, fma(-x, y, broadcast(1.0f)), y);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)), with a relative error of 3e-7 above -87; below it stays 1e-38.
FASTCV_INLINE Vec<float> sigmoid(Vec<float> x) {
  using C = ExpConstants<float>;
  const Vec<float> t = min(max(-x, broadcast(-87.0f)), broadcast(87.0f));
  const Vec<float> rounded = fma(t, broadcast(0x1.715476p0f), broadcast(C::kRound)), n = rounded - C::kRound;
  const Vec<float> r = fma(n, broadcast(-C::kLn2Low), fma(n, broadcast(-C::kLn2High), t));
  Vec<float> y = broadcast(1.0f / 720);  // Taylor's polynomial: 1.2e-7 at the ends
  constexpr float c[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int i = 0; i < 6; ++i) y = fma(y, r, broadcast(c[i]));
  Vec<int32_t> exponent, bits;
  memcpy(&exponent, &rounded, sizeof exponent);
  memcpy(&bits, &y, sizeof bits);
  bits += exponent << C::kMantissaBits;
  memcpy(&y, &bits, sizeof y);
  const Vec<float> result = reciprocal(1.0f + y);
  return x == x ? result : x;
}

}  // namespace fastcv::FASTCV_ISA
