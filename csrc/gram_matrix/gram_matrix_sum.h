// The loops that sum Gram matrices: packing, tiles, tasks. See gram_matrix_kernels.cpp.
#pragma once

#include "gram_matrix.h"

#include "../common/channel_block.h"
#include "gram_matrix_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

// Vectors of columns beside rows of a tile: on AVX-512 (32 registers) 8 x 3, which cuts a block of 16 rows in two, on 16
// registers 4 x 2.
constexpr int kGramVectors = kVectorBytes == 64 ? 3 : 2;
constexpr int kGramRows = kVectorBytes == 64 ? 8 : 4;

// Features of more channels are not fetched ahead: their lines meet in the same sets of the cache.
constexpr int64_t kMostBlocksAhead = 16;

// From a packed block to the next. Five lines more than its positions: blocks one power of two apart would meet in the
// same sets of the caches.
template <class T>
int64_t block_step(const GramPlan& plan) {
  return plan.chunk * kLanes<Acc<T>> + 5 * 64 / int64_t(sizeof(Acc<T>));
}

// The first row of blocks of a group: groups have equal numbers of block pairs.
int64_t first_row(const GramPlan& plan, int64_t group) {
  if (group == plan.groups) return plan.blocks;
  const double rest = 1 - double(group) / double(plan.groups);
  return int64_t(double(plan.blocks) * (1 - __builtin_sqrt(rest)) + 0.5);
}

// The features of a chunk, fetched into the second-level cache line by line while the chunk before is multiplied: memory
// has the time of the products. Lines outside the map are harmless.
class Ahead {
 public:
  template <class T>
  Ahead(const FeatureMap<const T>& map, int64_t image, int64_t channel, int64_t position, int64_t count) {
    if (count <= 0) return;
    const int64_t channels = map.channels - channel;
    line_ = reinterpret_cast<uintptr_t>(map.data + image * map.stride_n + channel * map.stride_c +
                                        position / map.width * map.stride_y + position % map.width * map.stride_x);
    const bool last = map.stride_c == 1;
    rows_ = last ? count : channels;
    row_bytes_ = (last ? channels : count) * int64_t(sizeof(T));
    step_ = (last ? map.stride_x : map.stride_c) * int64_t(sizeof(T));
  }
  FASTCV_INLINE void operator()() {
    if (rows_ <= 0) return;
    __builtin_prefetch(reinterpret_cast<const void*>(line_ + uintptr_t(at_)), 0, 2);
    at_ += 64;
    if (at_ < row_bytes_) return;
    at_ = 0, line_ += uintptr_t(step_), --rows_;
  }

 private:
  uintptr_t line_ = 0;
  int64_t at_ = 0, row_bytes_ = 0, step_ = 0, rows_ = 0;
};

template <class A>
struct Sums {
  const A* packed;  // [block][position][lane], from the first row's block on
  int64_t step;     // from block to block
  int64_t depth;
  A* to;            // of the split: [channel][channel], the first row's block at its place
  int64_t stride;
  bool first;       // chunk: sums begin at 0
  Ahead* ahead;
};

// Rows of block `i` from lane `r` on, by NV blocks from `j` on; both count from the first packed block.
template <bool Pairs, int R, int NV, class A>
void sum_tile(const Sums<A>& s, int64_t i, int r, int64_t j) {
  constexpr int L = kLanes<A>;
  A* const to = s.to + (i * L + r) * s.stride + j * L;
  Ahead ahead = *s.ahead;
  Vec<A> sum[R][NV];
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sum[q][v] = s.first ? Vec<A>{} : load(to + q * s.stride + v * L);
  multiply_add<Pairs>(sum, s.packed + i * s.step + r, 1, L, s.packed + j * s.step, s.step, L, s.depth,
                      [&]() FASTCV_INLINE_LAMBDA { ahead(); });
  *s.ahead = ahead;
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(to + q * s.stride + v * L, sum[q][v]);
}

// All rows of block `i` by `vectors` blocks, in tiles of nearly equal height.
template <bool Pairs, class A>
void sum_blocks(const Sums<A>& s, int64_t i, int64_t j, int vectors) {
  constexpr int L = kLanes<A>, kTiles = (L + kGramRows - 1) / kGramRows;
  with_constant<kGramVectors>(vectors, [&](auto nv) FASTCV_INLINE_LAMBDA {
    for (int t = 0, r = 0; t < kTiles; ++t) {
      constexpr int kLow = L / kTiles, kHigh = (L + kTiles - 1) / kTiles;
      if (t < L % kTiles) {
        sum_tile<Pairs, kHigh, decltype(nv)::value>(s, i, r, j);
        r += kHigh;
      } else {
        sum_tile<Pairs, kLow, decltype(nv)::value>(s, i, r, j);
        r += kLow;
      }
    }
  });
}

// Positions [first, first + count) of a block of channels, which may lie in several rows of the map.
template <class T>
void pack_positions(const FeatureMap<const T>& map, int64_t image, int64_t channel, int64_t first, int64_t count,
                    Acc<T>* block) {
  constexpr int L = kLanes<Acc<T>>;
  const int channels = int(min_of(L, map.channels - channel));
  const T* const source = map.data + image * map.stride_n + channel * map.stride_c;
  while (count > 0) {
    const int64_t y = first / map.width, x = first % map.width, n = min_of(count, map.width - x);
    pack(source + y * map.stride_y + x * map.stride_x, map.stride_c, map.stride_x, n, channels, block);
    first += n, count -= n, block += n * L;
  }
}

// Tasks begin <= t < end of a plan. Pairs: what lies at a position are two numbers in bfloat16.
template <bool Pairs, class T>
void sum_tasks(const FeatureMap<const T>& map, const GramPlan& plan, int64_t begin, int64_t end, Acc<T>* sums,
               Acc<T>* scratch) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t rows = plan.blocks * L, step = block_step<T>(plan);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t group = t % plan.groups, part = t / plan.groups, image = part / plan.splits;
    const int64_t from = part % plan.splits * plan.split_positions;
    const int64_t to = min_of(plan.positions, from + plan.split_positions);
    const int64_t top = first_row(plan, group), bottom = first_row(plan, group + 1), count = plan.blocks - top;
    Sums<Acc<T>> s{scratch, step, 0, sums + part * rows * rows + top * L * (rows + 1), rows, true, nullptr};
    for (int64_t p = from; p < to || s.first; p += plan.chunk, s.first = false) {
      s.depth = max_of(0, min_of(plan.chunk, to - p));
      for (int64_t b = 0; b < count; ++b) pack_positions(map, image, (top + b) * L, p, s.depth, scratch + b * step);
      const int64_t next = p + plan.chunk;
      Ahead ahead(map, image, top * L, next, plan.blocks <= kMostBlocksAhead ? min_of(plan.chunk, to - next) : 0);
      s.ahead = &ahead;
      for (int64_t i = 0; i < bottom - top; ++i)
        for (int64_t j = i; j < count;) {  // columns in strips of their own
          const int vectors = int(min_of(count, j / kGramVectors * kGramVectors + kGramVectors) - j);
          sum_blocks<Pairs>(s, i, j, vectors);
          j += vectors;
        }
    }
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
