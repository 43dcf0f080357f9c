// Winograd's transforms, along one axis of a tile: M output pixels of a convolution with R elements.
//
// They depend on P = M + R - 1 input pixels d. Input and filter are taken as polynomials, evaluated at P points,
// multiplied there, and the product's coefficients recovered (Toom and Cook; Winograd's transposed form):
//     output = A^T [ (G g) * (B^T d) ].
// B depends on P alone. Along an axis of 1 element tiles are of 1 pixel (P = 1), and nothing is transformed.
//
// The points are 0, +-p_1, +-p_2, ... and infinity, so that each pair shares its even and its odd part (for P = 5,
// which has one point more than pairs, they are 0, +-1, 2 and infinity, and written out). With F(x) = prod_i (x^2 -
// p_i^2):
//     B^T:  F for 0; x (x +- p) F / (x^2 - p^2) for +-p; x F for infinity (a row holds a polynomial's coefficients)
//     G:    x^j / (derivative of x F at x)
//     A^T:  x^k.
// Points only have to differ, and rounding errors depend much on them: an output's error grows with
//     sum over points of (A_k)^2 |B row|^2 |G row|^2 / R,
// of both axes multiplied. Searched over sixteenths, the standard deviation of rounding, in that of the direct sum's
// terms, of the worst output of a tile (and of the mean one):
//     F(2x2, 3x3), F(3x3, 2x2)   0, +-1          about the direct sum's
//     F(4x4, 3x3)   0, +-11/16, +-3/2   7.5 (4.8);   0, +-1, +-2 of the paper   31 (11)
//     F(2x2, 5x5)   0, +-11/16, +-3/2   5.6 (5.3);   0, +-1, +-2                20 (12)
//     F(5x5, 2x2)   the same            10 (5.4);    0, +-1, +-2                45 (12)
//     F(4x4, 2x2)   0, +-1, 2           16 (6.4)
//     F(3x3, 3x3)   the same            11 (6.0)
//     F(6x6, 3x3)   0, +-1/2, +-1, +-2   46 (21), the best there are
//     F(4x4, 5x5)   the same             30 (19)
// All coefficients of these A and B are exact in float32; scaling rows by powers of two would change no error.
#pragma once

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {

template <int P>
struct Points;  // the positive ones, but for infinity
template <>
struct Points<4> {
  static constexpr double at[] = {1};
};
template <>
struct Points<6> {
  static constexpr double at[] = {11 / 16., 3 / 2.};
};
template <>
struct Points<8> {
  static constexpr double at[] = {1 / 2., 1, 2};
};

template <int P>
struct Coefficients {
  static constexpr int pairs = P / 2 - 1;
  // Of F in x^2, constant first, and of F / (x^2 - p^2) for each p. The leading ones are 1.
  double full[pairs + 1]{}, without[pairs][pairs + 1]{};
  double power[pairs][P]{};  // p^k

  constexpr Coefficients() {
    for (int skipped = 0; skipped <= pairs; ++skipped) {
      double* c = skipped == pairs ? full : without[skipped];
      c[0] = 1;
      int degree = 0;
      for (int i = 0; i < pairs; ++i) {
        if (i == skipped) continue;
        ++degree;
        for (int k = degree; k >= 0; --k)
          c[k] = (k > 0 ? c[k - 1] : 0) - Points<P>::at[i] * Points<P>::at[i] * (k < degree ? c[k] : 0);
      }
    }
    for (int i = 0; i < pairs; ++i) {
      power[i][0] = 1;
      for (int k = 1; k < P; ++k) power[i][k] = power[i][k - 1] * Points<P>::at[i];
    }
  }
};

template <int P>
constexpr Coefficients<P> kCoefficients{};

// B^T d for one line of a patch.
FASTCV_INLINE void transform_input(const Vec<float> (&d)[1], Vec<float>* out, int64_t) { out[0] = d[0]; }
FASTCV_INLINE void transform_input(const Vec<float> (&d)[5], Vec<float>* out, int64_t step) {
  const Vec<float> a = d[3] - d[1];
  out[0] = 2.0f * (d[0] - d[2]) + a;
  out[step] = d[3] - d[2] - 2.0f * d[1];
  out[2 * step] = d[3] - 3.0f * d[2] + 2.0f * d[1];
  out[3 * step] = a;
  out[4 * step] = d[4] - d[2] - 2.0f * a;
}
template <int P>
FASTCV_INLINE void transform_input(const Vec<float> (&d)[P], Vec<float>* out, int64_t step) {
  constexpr int pairs = P / 2 - 1;
  constexpr const Coefficients<P>& k = kCoefficients<P>;
  Vec<float> first = d[2 * pairs], last = d[2 * pairs + 1];
#pragma GCC unroll 4
  for (int j = 0; j < pairs; ++j) {
    const Vec<float> c = broadcast(float(k.full[j]));
    first = fma(c, d[2 * j], first), last = fma(c, d[2 * j + 1], last);
  }
  out[0] = first, out[(P - 1) * step] = last;
#pragma GCC unroll 4
  for (int i = 0; i < pairs; ++i) {
    Vec<float> even = d[2 * pairs], odd = d[2 * pairs - 1];
#pragma GCC unroll 4
    for (int j = 0; j < pairs - 1; ++j) {
      const Vec<float> c = broadcast(float(k.without[i][j]));
      even = fma(c, d[2 * j + 2], even), odd = fma(c, d[2 * j + 1], odd);
    }
    const float p = float(k.power[i][1]);
    out[(2 * i + 1) * step] = fma(broadcast(p), odd, even);
    out[(2 * i + 2) * step] = fma(broadcast(-p), odd, even);
  }
}

// A^T m for one line: M outputs.
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[1], Vec<float>* out, int64_t) {
  out[0] = m[0];
}
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[5], Vec<float>* out, int64_t step) {
  const Vec<float> a = m[1] + m[2], b = m[1] - m[2];
  out[0] = m[0] + a + m[3];
  out[step] = b + 2.0f * m[3];
  out[2 * step] = M == 3 ? a + 4.0f * m[3] + m[4] : a + 4.0f * m[3];
  if constexpr (M == 4) out[3 * step] = b + 8.0f * m[3] + m[4];
}
template <int M, int P>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[P], Vec<float>* out, int64_t step) {
  constexpr int pairs = P / 2 - 1;
  Vec<float> even[pairs], odd[pairs];
#pragma GCC unroll 4
  for (int i = 0; i < pairs; ++i) even[i] = m[2 * i + 1] + m[2 * i + 2], odd[i] = m[2 * i + 1] - m[2 * i + 2];
#pragma GCC unroll 8
  for (int k = 0; k < M; ++k) {
    Vec<float> sum = float(kCoefficients<P>.power[0][k]) * (k % 2 ? odd[0] : even[0]);
#pragma GCC unroll 4
    for (int i = 1; i < pairs; ++i)
      sum = fma(broadcast(float(kCoefficients<P>.power[i][k])), k % 2 ? odd[i] : even[i], sum);
    if (k == 0) sum += m[0];
    if (k == M - 1) sum += m[P - 1];
    out[k * step] = sum;
  }
}

template <int R, int P>
struct WeightTransform {  // G
  double g[P][R]{};

  constexpr WeightTransform() {
    constexpr int pairs = P / 2 - 1;
    constexpr const Coefficients<P>& k = kCoefficients<P>;
    g[0][0] = 1 / k.full[0];
    g[P - 1][R - 1] = 1;
    for (int i = 0; i < pairs; ++i) {
      double value = 0;  // of F / (x^2 - p^2) at p
      for (int j = 0; j < pairs; ++j) value += k.without[i][j] * k.power[i][2 * j];
      for (int j = 0; j < R; ++j) {
        g[2 * i + 1][j] = k.power[i][j] / (2 * k.power[i][2] * value);
        g[2 * i + 2][j] = (j % 2 ? -1 : 1) * g[2 * i + 1][j];
      }
    }
  }
};

template <int R>
struct WeightTransform<R, 5> {
  double g[5][R]{};

  constexpr WeightTransform() {
    constexpr double point[] = {0, 1, -1, 2}, scale[] = {1 / 2., -1 / 2., -1 / 6., 1 / 6.};
    for (int i = 0; i < 4; ++i) {
      double power = scale[i];
      for (int j = 0; j < R; ++j, power *= point[i]) g[i][j] = power;
    }
    g[4][R - 1] = 1;
  }
};

template <>
struct WeightTransform<1, 1> {
  double g[1][1] = {{1}};
};

// One line of G g.
template <int R, int P>
FASTCV_INLINE void transform_weights(const Vec<float> (&g)[R], Vec<float> (&out)[P]) {
  constexpr WeightTransform<R, P> transform{};
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    Vec<float> sum{};
    bool first = true;
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
      if (transform.g[i][j] == 0) continue;
      const Vec<float> factor = broadcast(float(transform.g[i][j]));
      sum = first ? factor * g[j] : fma(factor, g[j], sum);
      first = false;
    }
    out[i] = sum;
  }
}

}  // namespace fastcv::FASTCV_ISA
