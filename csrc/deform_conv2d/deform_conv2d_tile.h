// Register-tiled products of small matrices whose columns lie in panels.
//
// A panel is kPanel columns (output pixels) of a matrix, stored row by row: [rows][kPanel]. The tile holds kRows x
// kPanel sums in registers: 16 vectors of 32 with AVX-512 and NEON, 12 of 16 with AVX2, 8 of 16 with SSE2, whose
// separate multiplication needs a register more.
#pragma once

#include "../common/channel_block.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class A>
constexpr int kPanel = 2 * kLanes<A>;

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRows = 8;
constexpr int kDotRows = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6;
constexpr int kDotRows = 2;
#else
constexpr int kRows = 4;
constexpr int kDotRows = 2;
#endif
constexpr int kDotColumns = 4;

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// Sums of L vectors' lanes: lane i of the result is the sum of rows[i].
template <int S, class V, int L>
FASTCV_INLINE void fold_rows(V (&rows)[L]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i) {
      swap_quarters<S>(rows[i], rows[i + S], typename MakeIndices<L>::type{});
      rows[i] += rows[i + S];
    }
    fold_rows<S / 2>(rows);
  }
}
template <class V, int L>
FASTCV_INLINE V sum_lanes(V (&rows)[L]) {
  fold_rows<L / 2>(rows);
  return rows[0];
}

// ---- C[r][:] (+)= sum over k of a[r, k] * B[k][:] -------------------------------------------------------------------

template <int R, class A>
void multiply_tile(const A* a, int64_t a_row, int64_t a_step, const A* b, A* c, int64_t depth, bool add) {
  constexpr int L = kLanes<A>;
  Vec<A> left[R], right[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    left[r] = add ? load(c + r * 2 * L) : Vec<A>{};
    right[r] = add ? load(c + r * 2 * L + L) : Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += 2 * L) {
    const Vec<A> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> factor = broadcast(a[r * a_row]);
      left[r] = fma(factor, b0, left[r]);
      right[r] = fma(factor, b1, right[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(c + r * 2 * L, left[r]);
    store(c + r * 2 * L + L, right[r]);
  }
}

template <class A, int R = kRows>
FASTCV_INLINE void multiply_rows(int rows, const A* a, int64_t a_row, int64_t a_step, const A* b, A* c, int64_t depth,
                                 bool add) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_tile<R>(a, a_row, a_step, b, c, depth, add);
    else
      multiply_rows<A, R - 1>(rows, a, a_row, a_step, b, c, depth, add);
  }
}

// ---- sums[r * sums_row + k] += sum over panels and their pixels of a[panel][r][:] * b[panel][k][:] ------------------

template <int R, int K, class A>
void dot_tile(const A* a, int64_t a_panel, const A* b, int64_t b_panel, int64_t panels, A* sums, int64_t sums_row) {
  constexpr int L = kLanes<A>;
  constexpr int groups = (R * K + L - 1) / L;
  Vec<A> total[groups][L] = {};  // of a[r] and b[k] in place r * K + k
  for (int64_t p = 0; p < panels; ++p, a += a_panel, b += b_panel)
    for (int half = 0; half < 2 * L; half += L) {
      Vec<A> column[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) column[k] = load(b + k * 2 * L + half);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> row = load(a + r * 2 * L + half);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          Vec<A>& sum = total[(r * K + k) / L][(r * K + k) % L];
          sum = fma(row, column[k], sum);
        }
      }
    }
  A dots[groups * L];
#pragma GCC unroll 8
  for (int g = 0; g < groups; ++g) store(dots + g * L, sum_lanes(total[g]));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sums[r * sums_row + k] += dots[r * K + k];
}

template <class A, int R = kDotRows, int K = kDotColumns>
FASTCV_INLINE void dot_rows(int rows, int columns, const A* a, int64_t a_panel, const A* b, int64_t b_panel,
                            int64_t panels, A* sums, int64_t sums_row) {
  if constexpr (R > 0 && K > 0) {
    if (rows < R)
      dot_rows<A, R - 1, K>(rows, columns, a, a_panel, b, b_panel, panels, sums, sums_row);
    else if (columns < K)
      dot_rows<A, R, K - 1>(rows, columns, a, a_panel, b, b_panel, panels, sums, sums_row);
    else
      dot_tile<R, K>(a, a_panel, b, b_panel, panels, sums, sums_row);
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
