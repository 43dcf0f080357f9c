// The inner loop of matrix products: a tile of sums in registers.
#pragma once

#include "../common/tiles.h"

namespace fastcv::FASTCV_ISA {

// Vectors of a panel of weights, and rows of a tile that the registers hold beside NV vectors of weights: on AVX-512
// (32 registers) 6 x 4, 8 x 3, 12 x 2 and 12 x 1; on 16 registers 6 x 2 and 12 x 1.
constexpr int kPanelVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kPanel = kPanelVectors * kLanes<float>;
constexpr int tile_rows(int vectors) {
  if (kVectorBytes == 64) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 2 ? 6 : 12;
}

// sum[r][v] += input[r * step + k] * weight[k][v] over k < depth; returns the end of the weights. Fetch: meanwhile
// brings what lies at `next` into the second-level cache, so many lines for each k.
template <bool Fetch = false, bool Pairs = false, int R, int NV>
FASTCV_INLINE const float* accumulate(Vec<float> (&sum)[R][NV], const float* input, int64_t step, int64_t depth,
                                      const float* weight, const float* next = nullptr, int lines = 0) {
  constexpr int L = kLanes<float>;
  for (int64_t k = 0; k < depth; ++k, weight += NV * L) {
    Vec<float> w[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) w[v] = load(weight + v * L);
    if constexpr (Fetch)
      for (int line = 0; line < lines; ++line, next += 16) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<float> x = broadcast(input[r * step + k]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[r][v] = Pairs ? add_pairs(x, w[v], sum[r][v]) : fma(x, w[v], sum[r][v]);
    }
  }
  return weight;
}

}  // namespace fastcv::FASTCV_ISA
