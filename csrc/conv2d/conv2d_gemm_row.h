// Rows of a matrix product in vector registers: see conv2d_gemm.h.
#pragma once

#include "conv2d_gemm_plan.h"

namespace fastcv::FASTCV_ISA {
namespace {

// Loops over sums are unrolled, or they would live in memory before and after the long loop.
template <int R, int NV>
void run_tile(const Tile& t) {
  const bool stream = t.conv->stream;
  if (t.final)  // lines to be written, and the residual's: from memory while the sums are made
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        if (!stream) __builtin_prefetch(t.output + r * t.output_step + v * L, 1, 3);
        if (t.residual) __builtin_prefetch(t.residual + r * t.residual_step + v * L, 0, 3);
      }
  Vec<float> sum[R][NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const Vec<float> bias = !t.bias || !t.first          ? Vec<float>{}
                           : v + 1 < NV || t.last == L ? load(t.bias + v * L)
                                                       : load_first(t.bias + v * L, t.last);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][v] = t.first ? bias : load(t.partial + r * kColumns + v * L);
  }
  const float *weight = t.weight, *next = t.next, *input_y = t.input;
  for (int64_t i = 0; i < t.runs_y; ++i, input_y += t.run_y) {
    const float* input = input_y;
    if (t.lines)
      for (int64_t j = 0; j < t.runs_x; ++j, input += t.run_x, next += t.run * t.lines * 16)
        weight = accumulate<true, kPairs>(sum, input, t.step, t.run, weight, next, t.lines);
    else
      for (int64_t j = 0; j < t.runs_x; ++j, input += t.run_x)
        weight = accumulate<false, kPairs>(sum, input, t.step, t.run, weight);
  }
  if (!t.final) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) store(t.partial + r * kColumns + v * L, sum[r][v]);
    return;
  }
  if (!t.bounds.exact || t.last != L) {
    float sums[R * NV * L];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) store(sums + (r * NV + v) * L, sum[r][v]);
    return finish_tile(*t.conv, sums, R, NV, (NV - 1) * L + t.last, t.residual, t.output);
  }
  const Vec<float> low = broadcast(t.bounds.low), high = broadcast(t.bounds.high);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float* residual = t.residual ? t.residual + r * t.residual_step : nullptr;
    float* output = t.output + r * t.output_step;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      if (residual) sum[r][v] += load(residual + v * L);
      const Vec<float> y = min(high, max(low, sum[r][v]));
      stream ? store_streaming(output + v * L, y) : store(output + v * L, y);
    }
  }
}

template <int R, int NV>
void run_rows(int rows, const Tile& t) {
  if constexpr (R > 1)
    if (rows < R) return run_rows<R - 1, NV>(rows, t);
  run_tile<R, NV>(t);
}

void run_vectors(int vectors, int rows, const Tile& t) {
  switch (vectors) {
    case 1: return run_rows<tile_rows(1), 1>(rows, t);
    case 2: return run_rows<tile_rows(2), 2>(rows, t);
    case 3: return run_rows<tile_rows(3), kPanelVectors == 4 ? 3 : 1>(rows, t);
    default: return run_rows<tile_rows(4), kPanelVectors == 4 ? 4 : 1>(rows, t);
  }
}

// A row of output pixels, cut evenly into tiles, for one panel; the last ones fetch the weights at t.next, if any. One
// line for each step is what memory has time for; where there are few tiles it must be more.
void run_row(Tile t, int64_t pixels, int vectors) {
  const int64_t most = tile_rows(vectors), tiles = ceil_div(pixels, most), all = ceil_div(vectors * L, 16);
  const int64_t lines = t.next ? ceil_div(all, tiles) : 0, fetching = t.next ? ceil_div(all, lines) : 0;
  for (int64_t i = 0, x = 0; i < tiles; ++i) {
    const int64_t rows = (pixels - x) / (tiles - i);
    if (t.lines) t.next += t.lines * t.runs_y * t.runs_x * t.run * 16;
    t.lines = i >= tiles - fetching ? int(lines) : 0;
    if (t.fetch && i + 1 < tiles)
      for (int64_t r = rows; r < 2 * rows; ++r)
        for (int64_t k = 0; k < t.run; k += 16) __builtin_prefetch(t.input + r * t.step + k);
    run_vectors(vectors, int(rows), t);
    if (t.partial) t.partial += rows * kColumns;
    t.input += rows * t.step;
    t.output += rows * t.output_step;
    if (t.residual) t.residual += rows * t.residual_step;
    x += rows;
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
