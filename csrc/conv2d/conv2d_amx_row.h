// Rows of a matrix product in the processor's tiles (common/tiles.h): see conv2d_gemm.h, whose layouts of input and
// weights are those that tiles are loaded from. 32 pixels by two vectors of output channels are four tiles of sums, for
// which two tiles of pixels and two of weights are loaded at each step of the depth.
#pragma once

#include "conv2d_gemm_plan.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int kBlockRows = 2 * kTileRows;

// Words of the depth that one tile takes of a run: as many for each. 0: there is no such number.
int64_t tile_words(int64_t run) {
  const int64_t steps = ceil_div(run, kTileWords);
  return run % steps == 0 ? run / steps : 0;
}

// R * 16 pixels by V vectors of the panel, to sums [pixel][V * L].
template <int R, int V>
void multiply_block(Tiles& tiles, const Tile& t, int64_t words, const float* bias, float* sums) {
  if (!t.first) {
    tiles.load<0>(t.partial, kColumns);
    if constexpr (V == 2) tiles.load<1>(t.partial + L, kColumns);
    if constexpr (R == 2) tiles.load<2>(t.partial + kTileRows * kColumns, kColumns);
    if constexpr (R == 2 && V == 2) tiles.load<3>(t.partial + kTileRows * kColumns + L, kColumns);
  } else {  // every row is the bias
    tiles.load<0>(bias, 0);
    if constexpr (V == 2) tiles.load<1>(bias + L, 0);
    if constexpr (R == 2) tiles.load<2>(bias, 0);
    if constexpr (R == 2 && V == 2) tiles.load<3>(bias + L, 0);
  }
  const float *weight = t.weight, *input_y = t.input;
  for (int64_t i = 0; i < t.runs_y; ++i, input_y += t.run_y) {
    const float* input_x = input_y;
    for (int64_t j = 0; j < t.runs_x; ++j, input_x += t.run_x)
      for (int64_t k = 0; k < t.run; k += words, weight += words * V * L) {
        tiles.load<6>(weight, V * L);
        if constexpr (V == 2) tiles.load<7>(weight + L, V * L);
        tiles.load<4>(input_x + k, t.step);
        tiles.multiply<0, 4, 6>();
        if constexpr (V == 2) tiles.multiply<1, 4, 7>();
        if constexpr (R == 2) {
          tiles.load<5>(input_x + k + kTileRows * t.step, t.step);
          tiles.multiply<2, 5, 6>();
          if constexpr (V == 2) tiles.multiply<3, 5, 7>();
        }
      }
  }
  tiles.store<0>(sums, V * L);
  if constexpr (V == 2) tiles.store<1>(sums + L, V * L);
  if constexpr (R == 2) tiles.store<2>(sums + kTileRows * V * L, V * L);
  if constexpr (R == 2 && V == 2) tiles.store<3>(sums + kTileRows * V * L + L, V * L);
}

// The pixels of a block that exist: n channels of its V vectors, from memory to memory.
template <int V>
void finish_block(const Tile& t, float* sums, int rows, int n) {
  if (!t.final) {
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < V; ++v) store(t.partial + r * kColumns + v * L, load(sums + (r * V + v) * L));
    return;
  }
  if (!t.bounds.exact || n != V * L) return finish_tile(*t.conv, sums, rows, V, n, t.residual, t.output);
  const Vec<float> low = broadcast(t.bounds.low), high = broadcast(t.bounds.high);
  const bool packed = t.conv->output.packed, stream = t.conv->stream && !packed;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v) {
      Vec<float> y = load(sums + (r * V + v) * L);
      if (t.residual) y += load_channels(t.conv->residual.packed, t.residual + r * t.residual_step, v * L, L);
      y = min(high, max(low, y));
      float* to = t.output + r * t.output_step;
      stream ? store_streaming(to + v * L, y) : store_channels(packed, to, v * L, y, L);
    }
}

template <int V>
void run_block(Tiles& tiles, const Tile& t, int rows, int n, int64_t words, const float* bias) {
  if (t.final)  // lines to be written, and the residual's: from memory while the sums are made
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < V; ++v) {
        if (!t.conv->stream) __builtin_prefetch(t.output + r * t.output_step + v * L, 1, 3);
        if (t.residual) __builtin_prefetch(t.residual + r * t.residual_step + v * L, 0, 3);
      }
  alignas(64) float sums[kBlockRows * V * L];
  if (rows > kTileRows)
    multiply_block<2, V>(tiles, t, words, bias, sums);
  else
    multiply_block<1, V>(tiles, t, words, bias, sums);
  finish_block<V>(t, sums, rows, n);
}

// A row of output pixels for one panel. Blocks are whole: what they read after the last pixel is in scratch, and their
// sums of it are left.
void run_row(Tile t, int64_t pixels, int vectors) {
  const int64_t words = tile_words(t.run);
  const int n = (vectors - 1) * L + t.last;
  Tiles tiles(words);
  alignas(64) float bias[kColumns] = {};
  if (t.bias) memcpy(bias, t.bias, size_t(n) * sizeof(float));
  for (int64_t x = 0; x < pixels; x += kBlockRows) {
    const int rows = int(min_of(kBlockRows, pixels - x));
    vectors == 2 ? run_block<2>(tiles, t, rows, n, words, bias) : run_block<1>(tiles, t, rows, n, words, bias);
    t.input += kBlockRows * t.step, t.output += kBlockRows * t.output_step;
    if (t.residual) t.residual += kBlockRows * t.residual_step;
    if (t.partial) t.partial += kBlockRows * kColumns;
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
