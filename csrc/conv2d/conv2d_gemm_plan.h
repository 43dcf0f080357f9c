// How a convolution as a matrix product is divided into blocks of pixels, panels of outputs, and chunks of depth.
// conv2d_gemm.h, which includes this, says why.
#pragma once

#include "conv2d_epilogue.h"
#include "conv2d_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kColumns = kTiles ? 2 * L : kPanel;  // outputs of a panel
constexpr int64_t kBlockElements = 48 * 1024;  // of the input of a task: 192 KB
constexpr int64_t kLargeBlock = 128 * 1024;    // where heavy weights are read for each: 512 KB
constexpr int64_t kHeavy = 512 * 1024;         // weights that the second-level cache does not hold: 2 MB
constexpr int64_t kLeastPixels = kTiles ? 64 : 12, kMostPixels = 192;
constexpr int64_t kEnoughTasks = 8, kFewTasks = 4;  // for each thread; where weights are heavy
constexpr int64_t kTallPixels = 576, kTallColumns = 144;  // where kernels overlap: rows of input are copied fewer times
constexpr int64_t kChunkDepth = (kTiles ? 2 : 1) * 1536 * 16 / L;  // of a panel that is not cut: 384 KB
// Where the pixels' channels are cut: how deep, and panels of a task.
constexpr int64_t kFlatChunk = 512, kChunkedPanels = 4;

// Words of a pixel of a group.
FASTCV_INLINE int64_t words(const Conv2dShape& s) {
  return kPairs ? ceil_div(s.group_channels(), 2) : s.group_channels();
}

struct Plan {
  bool flat;      // 1x1 without padding: output pixels of an image are one row
  bool in_place;  // and with stride 1: reads the input where it lies, else a copy in which pixels lie side by side
  int64_t block_h, block_w, blocks_y, blocks_x;  // of output pixels
  int64_t panels, panel_groups, group_panels;
  int64_t strip_h, strip_w;  // pixels of the copied input
  int64_t row_step;  // in it, from a row of the kernel to the next: rows between that no pixel needs are left out
  int64_t depth;
  int64_t chunks;  // of the depth: kernel rows, or channels where there is one
};

Plan make_plan(const Conv2dShape& s) {
  Plan p{};
  const int64_t channels = words(s);
  p.depth = s.kernel_h * s.kernel_w * channels;
  p.flat = s.kernel_h == 1 && s.kernel_w == 1 && s.pad_h == 0 && s.pad_w == 0 &&
           (s.out_height - 1) * s.stride_h < s.height && (s.out_width - 1) * s.stride_w < s.width;
  p.in_place = p.flat && s.stride_h == 1 && s.stride_w == 1 && !s.input_norm && !kPairs;
  const int64_t rows = p.flat ? 1 : s.out_height, columns = p.flat ? s.out_height * s.out_width : s.out_width;
  // Input elements for each output pixel, about.
  p.chunks = p.flat           ? (p.depth > kChunkDepth && !kTiles ? ceil_div(p.depth, kFlatChunk) : 1)
             : s.kernel_h > 1 ? min_of(s.kernel_h, ceil_div(p.depth, kChunkDepth))
                              : 1;
  const int64_t resident = p.in_place ? ceil_div(channels, p.chunks) : channels;
  const int64_t reach = resident * (p.flat ? 1 : min_of(s.stride_h, s.kernel_h) * min_of(s.stride_w, s.kernel_w));
  const bool heavy = p.depth * s.group_outputs() >= kHeavy, tall = !p.flat && s.stride_h < s.kernel_h;
  const int64_t fits = (heavy ? kLargeBlock : kBlockElements) / max_of(1, reach);
  int64_t pixels = max_of(kLeastPixels, min_of(tall ? kTallPixels : kMostPixels, fits));
  p.panels = ceil_div(s.group_outputs(), kColumns);
  p.blocks_x = ceil_div(columns, tall ? min_of(pixels, kTallColumns) : pixels);
  // As much work for every thread: 17 blocks would leave one of two waiting for half a block.
  const bool few = p.flat && s.images * s.groups * p.blocks_x < kEnoughTasks * 2 * s.threads;
  if (few && (p.blocks_x > 1 || (p.panels % s.threads && p.panels < 4 * s.threads)))
    p.blocks_x = min_of(ceil_div(p.blocks_x, s.threads) * s.threads, columns);
  p.block_w = ceil_div(columns, p.blocks_x);
  p.blocks_x = ceil_div(columns, p.block_w);
  // Few rows to a block are work for all threads; but heavy weights are read for each block, so there tasks are panels.
  const int64_t tasks = (heavy ? kFewTasks : kEnoughTasks) * s.threads;
  const int64_t shares = s.images * rows * p.blocks_x * (heavy ? p.panels : 1);
  if (tall) pixels = min_of(pixels, max_of(1, shares / tasks) * p.block_w);
  p.block_h = max_of(1, min_of(rows, pixels / p.block_w));
  p.blocks_y = ceil_div(rows, p.block_h);
  p.block_h = ceil_div(rows, p.blocks_y);
  const int64_t blocks = s.images * s.groups * p.blocks_y * p.blocks_x;
  p.panel_groups = min_of(p.panels, ceil_div(tasks, max_of(1, blocks)));
  p.group_panels = ceil_div(p.panels, p.panel_groups);
  if (p.block_h * p.block_w <= tile_rows(kPanelVectors)) p.chunks = 1;  // weights are read once anyway
  if (p.chunks > 1) p.group_panels = min_of(p.group_panels, kChunkedPanels);
  p.panel_groups = ceil_div(p.panels, p.group_panels);
  const int64_t span = (p.block_h - 1) * s.stride_h + 1;
  p.row_step = min_of(s.dilation_h, span);
  p.strip_h = p.flat ? 1 : span + (s.kernel_h - 1) * p.row_step;
  p.strip_w = p.flat ? p.block_w : (p.block_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  return p;
}

// A row of output pixels of a panel, and the part of the depth that is summed.
struct Tile {
  explicit Tile(Activation activation) : bounds(activation) {}

  const Conv2d* conv{};
  const float* input{};      // of the first pixel
  int64_t step{};            // to the next pixel's
  int64_t runs_y, runs_x;  // runs of the depth: rows of the kernel, or its elements
  int64_t run_y, run_x;    // from one to the next
  int64_t run{};             // elements of one
  const float* weight{};     // of the panel
  const float* next{};       // weights to be fetched meanwhile
  int lines{};               // of them for each step of the depth
  float* partial{};          // sums of the first pixel from one chunk to the next, kColumns to a pixel; null: one chunk
  bool first{true}, final{true};  // chunk
  bool fetch{false};         // the next pixels' input, which nobody has read before
  const float* bias{};       // of the panel's first channel, or null
  const float* residual{};   // of the first pixel and channel, or null
  float* output{};
  int64_t residual_step, output_step;
  int last;  // lanes of the last vector
  Bounds bounds;
};

}  // namespace
}  // namespace fastcv::FASTCV_ISA
