// How a convolution as a matrix product is divided into blocks of pixels, panels of outputs, and chunks of depth.
// conv2d_gemm.h, which includes this, says why.
#pragma once

#include "conv2d_epilogue.h"
#include "conv2d_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kBlockElements = 48 * 1024;  // of the input of a task: 192 KB
constexpr int64_t kLargeBlock = 128 * 1024;    // where weights (of 2 MB and more) are read for each: 512 KB
constexpr int64_t kMostPixels = 192, kEnoughTasks = 8;  // for each thread
constexpr int64_t kTallPixels = 576, kTallColumns = 144;  // where kernels overlap: rows of input are copied fewer times
constexpr int64_t kChunkDepth = 1536 * 16 / L;  // of a panel that is not cut: 384 KB
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
  p.chunks = p.flat           ? (p.depth > kChunkDepth ? ceil_div(p.depth, kFlatChunk) : 1)
             : s.kernel_h > 1 ? min_of(s.kernel_h, ceil_div(p.depth, kChunkDepth))
                              : 1;
  const int64_t resident = p.in_place ? ceil_div(channels, p.chunks) : channels;
  const int64_t reach = resident * (p.flat ? 1 : min_of(s.stride_h, s.kernel_h) * min_of(s.stride_w, s.kernel_w));
  const int64_t elements = p.depth * s.group_outputs() < 512 * 1024 ? kBlockElements : kLargeBlock;
  const bool tall = !p.flat && s.stride_h < s.kernel_h;
  const int64_t fits = elements / max_of(1, reach), pixels = max_of(12, min_of(tall ? kTallPixels : kMostPixels, fits));
  p.panels = ceil_div(s.group_outputs(), kPanel);
  p.blocks_x = ceil_div(columns, tall ? min_of(pixels, kTallColumns) : pixels);
  // As much work for every thread: 17 blocks would leave one of two waiting for half a block.
  const bool few = p.flat && s.images * s.groups * p.blocks_x < kEnoughTasks * 2 * s.threads;
  if (few && (p.blocks_x > 1 || (p.panels % s.threads && p.panels < 4 * s.threads)))
    p.blocks_x = min_of(ceil_div(p.blocks_x, s.threads) * s.threads, columns);
  p.block_w = ceil_div(columns, p.blocks_x);
  p.blocks_x = ceil_div(columns, p.block_w);
  p.block_h = max_of(1, min_of(tall ? s.images * rows * p.blocks_x / (kEnoughTasks * s.threads) : rows,
                               min_of(rows, pixels / p.block_w)));
  p.blocks_y = ceil_div(rows, p.block_h);
  const int64_t blocks = s.images * s.groups * p.blocks_y * p.blocks_x;
  p.panel_groups = min_of(p.panels, ceil_div(kEnoughTasks * s.threads, max_of(1, blocks)));
  p.group_panels = ceil_div(p.panels, p.panel_groups);
  if (p.block_h * p.block_w <= tile_rows(kPanelVectors)) p.chunks = 1;  // weights are read once anyway
  if (p.chunks > 1) p.group_panels = min_of(p.group_panels, kChunkedPanels);
  p.panel_groups = ceil_div(p.panels, p.group_panels);
  p.strip_h = p.flat ? 1 : (p.block_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  p.strip_w = p.flat ? p.block_w : (p.block_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  return p;
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
