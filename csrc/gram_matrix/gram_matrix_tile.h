// The inner loop of Gram matrices and of their gradients: a tile of sums in registers.
#pragma once

#include "../conv2d/conv2d_tile.h"

namespace fastcv::FASTCV_ISA {

struct Nothing {
  void operator()() const {}
};

// sum[r][v] += rows[r * row_step + k * depth_step] * columns[v * vector_step + k * column_step] over k < depth. Pairs:
// of two bfloat16 numbers each. `ahead` is called for every other k, to fetch what comes next.
template <bool Pairs = false, class A, int R, int NV, class Ahead = Nothing>
FASTCV_INLINE void multiply_add(Vec<A> (&sum)[R][NV], const A* rows, int64_t row_step, int64_t depth_step,
                                const A* columns, int64_t vector_step, int64_t column_step, int64_t depth,
                                const Ahead& ahead = {}) {
  for (int64_t k = 0; k < depth; ++k, rows += depth_step, columns += column_step) {
    if (k % 2) ahead();
    Vec<A> w[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) w[v] = load(columns + v * vector_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = broadcast(rows[r * row_step]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v)
        if constexpr (Pairs)
          sum[r][v] = add_pairs(x, w[v], sum[r][v]);
        else
          sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
}

// f(integral constant R) for R = rows, 1 <= rows <= Most.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int Most, class F>
FASTCV_INLINE void with_constant(int n, const F& f) {
  if constexpr (Most > 1)
    if (n < Most) return with_constant<Most - 1>(n, f);
  f(Constant<Most>{});
}

}  // namespace fastcv::FASTCV_ISA
