// Derivatives of sampling, with respect to the positions and the mask (sums over channels) and to the input
// (scattered).
#pragma once

#include "deform_conv2d_sample.h"

namespace fastcv::FASTCV_ISA {
namespace {

// Derivatives of the pairs' weights with respect to the position.
template <class A>
struct alignas(64) PairSlopes {
  A y_upper[2 * kPanel<A>], y_lower[2 * kPanel<A>], x_upper[2 * kPanel<A>], x_lower[2 * kPanel<A>];
};

// Sums over channels for the pixels of a panel: gradients with respect to y, x and mask.
template <class A>
struct alignas(64) Totals {
  A y[kPanel<A>], x[kPanel<A>], mask[kPanel<A>];
};

// ---- planes ---------------------------------------------------------------------------------------------------------

// For channels c < n of `planes`: rows[c] = modulated samples; adds grad[c] times the derivatives of the samples to
// totals.
template <bool kKeep, class T, class A>
void differentiate_planes(const T* planes, int64_t plane_step, int64_t n, int64_t pair_step, const PairTaps<A>& taps,
                          const PairSlopes<A>& slopes, const A* mask, const A* grad, A* rows, int64_t row_step,
                          Totals<A>& totals) {
  for (int i = 0; i < kPanel<A>; i += 4) {
    const FourSamples<A> weight = load_weights(taps.upper, taps.lower, i);
    const FourSamples<A> slope_y = load_weights(slopes.y_upper, slopes.y_lower, i);
    const FourSamples<A> slope_x = load_weights(slopes.x_upper, slopes.x_lower, i);
    const Quad<A> m = load4(mask + i);
    Quad<A> y = {}, x = {}, modulation = {};
    for (int64_t c = 0; c < n; ++c) {
      const FourSamples<A> s = load_samples<kKeep>(planes + c * plane_step, pair_step, taps, i);
      const Quad<A> g = load4(grad + c * row_step + i), value = weigh(s, weight);
      store4(rows + c * row_step + i, value * m);
      y = fma4(g, weigh(s, slope_y), y);
      x = fma4(g, weigh(s, slope_x), x);
      modulation = fma4(g, value, modulation);
    }
    store4(totals.y + i, load4(totals.y + i) + y * m);
    store4(totals.x + i, load4(totals.x + i) + x * m);
    store4(totals.mask + i, load4(totals.mask + i) + modulation);
  }
}

template <class A>
FASTCV_INLINE void add_pair(A* to, const A* weight, A g) {
  typename VecN<A, 2>::type sum, w;
  memcpy(&sum, to, sizeof sum);
  memcpy(&w, weight, sizeof w);
  sum += w * g;
  memcpy(to, &sum, sizeof sum);
}

// Adds weight times grad[c] to the four neighbours of each sample in channels c < n of `planes`.
//
// Neighbours of different samples coincide, so they are added one sample after the other. Pixels next to each other
// often add to overlapping pairs, and a load that overlaps a store in flight waits until that is done: hence channels
// in the inner loop and the pixels of a panel in strides of a quarter.
template <class A>
void scatter_planes(const A* grad, int64_t row_step, int64_t n, const PairTaps<A>& taps, int64_t pair_step, A* planes,
                    int64_t plane_step) {
  for (int k = 0; k < kPanel<A>; ++k) {
    const int i = k % 4 * (kPanel<A> / 4) + k / 4, j = 2 * i;
    const A *upper_weight = taps.upper + j, *lower_weight = taps.lower + j;
    A* plane = planes + taps.base[i];
    const bool inside = taps.all_inside || (taps.keep_upper[j] && taps.keep_upper[j + 1] && taps.keep_lower[j] &&
                                            taps.keep_lower[j + 1]);
    for (int64_t c = 0; c < n; ++c, plane += plane_step) {
      const A g = grad[c * row_step + i];
      A* lower = plane + pair_step;
      if (inside) {
        add_pair(plane, upper_weight, g);
        add_pair(lower, lower_weight, g);
        continue;
      }
      if (taps.keep_upper[j]) plane[0] += upper_weight[0] * g;
      if (taps.keep_upper[j + 1]) plane[1] += upper_weight[1] * g;
      if (taps.keep_lower[j]) lower[0] += lower_weight[0] * g;
      if (taps.keep_lower[j + 1]) lower[1] += lower_weight[1] * g;
    }
  }
}

// ---- channels-last --------------------------------------------------------------------------------------------------

// Sums over channels, before the lanes are summed.
template <class A>
struct alignas(64) VectorTotals {
  Vec<A> y[kPanel<A>], x[kPanel<A>], mask[kPanel<A>];
};

// rows[c][first + i] of c < n <= L as L vectors of channels, one for each pixel.
template <class A>
FASTCV_INLINE void load_square(const A* rows, int64_t row_step, int n, Vec<A> (&square)[kLanes<A>]) {
  for (int c = 0; c < kLanes<A>; ++c) square[c] = c < n ? load(rows + c * row_step) : Vec<A>{};
  transpose(square);
}

template <bool kFull, class T, class A>
void differentiate_square(const T* channel, int n, const int64_t* stride, const CornerTaps<A>& taps,
                          const Positions<A>& at, int first, const A* grad, A* rows, int64_t row_step,
                          VectorTotals<A>& totals) {
  constexpr int L = kLanes<A>;
  Vec<A> square[L];
  load_square(grad, row_step, n, square);
  for (int j = 0; j < L; ++j) {
    const int i = first + j;
    const int64_t upper = taps.base[i], lower = upper + stride[2];
    const int32_t valid = taps.valid[i];
    const auto corner = [&](int which, int64_t where) {
      return valid & which ? load_channels<kFull>(channel + where, n) : Vec<A>{};
    };
    const Vec<A> a = corner(kUpperLeft, upper), b = corner(kUpperRight, upper + stride[3]);
    const Vec<A> c = corner(kLowerLeft, lower), d = corner(kLowerRight, lower + stride[3]);
    Vec<A> value = a * broadcast(taps.weight[0][i]);
    value = fma(b, broadcast(taps.weight[1][i]), value);
    value = fma(c, broadcast(taps.weight[2][i]), value);
    value = fma(d, broadcast(taps.weight[3][i]), value);
    const Vec<A> fy = broadcast(at.fy[i]), fx = broadcast(at.fx[i]);
    const Vec<A> left = c - a, right = d - b, top = b - a, bottom = d - c, g = square[j];
    totals.y[i] = fma(g, fma(fx, right - left, left), totals.y[i]);
    totals.x[i] = fma(g, fma(fy, bottom - top, top), totals.x[i]);
    totals.mask[i] = fma(g, value, totals.mask[i]);
    square[j] = value * broadcast(at.mask[i]);
  }
  transpose(square);
  for (int c = 0; c < n; ++c) store(rows + c * row_step, square[c]);
}

template <class A>
void sum_totals(const VectorTotals<A>& from, const A* mask, Totals<A>& to) {
  constexpr int L = kLanes<A>;
  const auto sum = [](const Vec<A>* vectors) {
    Vec<A> square[L];
    for (int j = 0; j < L; ++j) square[j] = vectors[j];
    return sum_lanes(square);
  };
  for (int half = 0; half < kPanel<A>; half += L) {
    store(to.y + half, sum(from.y + half) * load(mask + half));
    store(to.x + half, sum(from.x + half) * load(mask + half));
    store(to.mask + half, sum(from.mask + half));
  }
}

template <bool kFull, class A>
FASTCV_INLINE void add_channels(A* to, Vec<A> v, int n) {
  if constexpr (kFull)
    store(to, load(to) + v);
  else
    store_first(to, load_first(to, n) + v, n);
}

template <bool kFull, class A>
void scatter_square(const A* grad, int64_t row_step, int n, const int64_t* stride, const CornerTaps<A>& taps, int first,
                    A* channel) {
  Vec<A> square[kLanes<A>];
  load_square(grad, row_step, n, square);
  for (int j = 0; j < kLanes<A>; ++j) {
    const int i = first + j;
    const int64_t upper = taps.base[i], lower = upper + stride[2];
    const int32_t valid = taps.valid[i];
    const auto add = [&](int which, int64_t where, int corner) {
      if (valid & which) add_channels<kFull>(channel + where, square[j] * broadcast(taps.weight[corner][i]), n);
    };
    add(kUpperLeft, upper, 0);
    add(kUpperRight, upper + stride[3], 1);
    add(kLowerLeft, lower, 2);
    add(kLowerRight, lower + stride[3], 3);
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
