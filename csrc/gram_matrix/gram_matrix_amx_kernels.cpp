// Gram matrices of bfloat16 features in the processor's tiles (common/tiles.h), of words of two neighbouring positions
// as in gram_matrix_bf16_kernels.cpp. A chunk of words is packed twice: as it lies, [channel][word], for the rows of
// the product, and transposed, [block][word][lane], for its columns, as gram_matrix_kernels.cpp has it for both. Chunks
// are filled up with zeros to whole tiles. Two blocks of rows by two of columns are summed at once, so that each tile
// is multiplied twice; on the diagonal one of the four is summed in vain.
//
// 256 channels of 128 x 128: 0.6 G multiply-adds, 0.2 ms on two cores at 2.9 GHz and 512 a cycle, and packing 8 MB;
// measured 0.99 ms, and 5.5 in vectors of pairs.
#include "../common/tiles.h"
#include "gram_matrix_sum.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
int64_t whole_tiles(int64_t words) { return ceil_div(words, kTileWords) * kTileWords; }

// Words from a channel to the next, and from a transposed block to the next; apart from powers of two.
int64_t row_step(const GramPlan& plan) { return whole_tiles(plan.chunk) + 16; }
int64_t column_step(const GramPlan& plan) { return whole_tiles(plan.chunk) * L + 80; }

// A block of channels in both layouts.
void pack_block(const FeatureMap<const float>& map, int64_t image, int64_t channel, int64_t first, int64_t count,
                float* rows, int64_t step, float* columns) {
  pack_positions(map, image, channel, first, count, columns);
  const int64_t padding = whole_tiles(count) - count;
  memset(columns + count * L, 0, size_t(padding * L) * sizeof(float));
  const int64_t channels = min_of(L, map.channels - channel);
  for (int64_t c = 0; c < L; ++c, rows += step) {
    if (c >= channels) {
      memset(rows, 0, size_t(count + padding) * sizeof(float));
      continue;
    }
    const float* const from = map.data + image * map.stride_n + (channel + c) * map.stride_c;
    for (int64_t p = 0; p < count;) {
      const int64_t y = (first + p) / map.width, x = (first + p) % map.width, n = min_of(count - p, map.width - x);
      memcpy(rows + p, from + y * map.stride_y + x, size_t(n) * sizeof(float));
      p += n;
    }
    memset(rows + count, 0, size_t(padding) * sizeof(float));
  }
}

struct Chunk {
  const float *rows, *columns;  // of the first of the blocks
  int64_t row_step, column_step, words;
  float* to;  // of the split: [channel][channel]
  int64_t stride;
  bool first;  // sums begin at 0
};

// R blocks of rows from i on by V blocks of columns from j on.
template <int R, int V>
void multiply_blocks(Tiles& tiles, const Chunk& s, int64_t i, int64_t j) {
  float* const to = s.to + i * L * s.stride + j * L;
  const int64_t down = L * s.stride;
  if (s.first) {
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  } else {
    tiles.load<0>(to, s.stride);
    if constexpr (V == 2) tiles.load<1>(to + L, s.stride);
    if constexpr (R == 2) tiles.load<2>(to + down, s.stride);
    if constexpr (R == 2 && V == 2) tiles.load<3>(to + down + L, s.stride);
  }
  const float *a = s.rows + i * L * s.row_step, *b = s.columns + j * s.column_step;
  for (int64_t k = 0; k < s.words; k += kTileWords, a += kTileWords, b += kTileWords * L) {
    tiles.load<6>(b, L);
    if constexpr (V == 2) tiles.load<7>(b + s.column_step, L);
    tiles.load<4>(a, s.row_step);
    tiles.multiply<0, 4, 6>();
    if constexpr (V == 2) tiles.multiply<1, 4, 7>();
    if constexpr (R == 2) {
      tiles.load<5>(a + L * s.row_step, s.row_step);
      tiles.multiply<2, 5, 6>();
      if constexpr (V == 2) tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(to, s.stride);
  if constexpr (V == 2) tiles.store<1>(to + L, s.stride);
  if constexpr (R == 2) tiles.store<2>(to + down, s.stride);
  if constexpr (R == 2 && V == 2) tiles.store<3>(to + down + L, s.stride);
}

}  // namespace

int64_t gram_sum_tiles_scratch(const GramPlan& plan) { return plan.blocks * (L * row_step(plan) + column_step(plan)); }

void gram_sum_tiles(const FeatureMap<const float>& map, const GramPlan& plan, int64_t begin, int64_t end, float* sums,
                    float* scratch) {
  const int64_t size = plan.blocks * L;
  Tiles tiles(kTileWords);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t group = t % plan.groups, part = t / plan.groups, image = part / plan.splits;
    const int64_t from = part % plan.splits * plan.split_positions;
    const int64_t to = min_of(plan.positions, from + plan.split_positions);
    const int64_t top = first_row(plan, group), bottom = first_row(plan, group + 1), count = plan.blocks - top;
    float* const columns = scratch + plan.blocks * L * row_step(plan);
    Chunk s{scratch, columns, row_step(plan), column_step(plan), 0, sums + part * size * size + top * L * (size + 1),
            size, true};
    for (int64_t p = from; p < to || s.first; p += plan.chunk, s.first = false) {
      const int64_t words = max_of(0, min_of(plan.chunk, to - p));
      s.words = whole_tiles(words);
      for (int64_t b = 0; b < count; ++b)
        pack_block(map, image, (top + b) * L, p, words, scratch + b * L * s.row_step, s.row_step,
                   columns + b * s.column_step);
      for (int64_t i = 0; i < bottom - top; i += 2)
        for (int64_t j = i; j < count; j += 2) {
          const bool tall = i + 1 < bottom - top, wide = j + 1 < count;
          tall ? (wide ? multiply_blocks<2, 2>(tiles, s, i, j) : multiply_blocks<2, 1>(tiles, s, i, j))
               : (wide ? multiply_blocks<1, 2>(tiles, s, i, j) : multiply_blocks<1, 1>(tiles, s, i, j));
        }
    }
  }
}

}  // namespace fastcv::FASTCV_ISA
