// Convolution as a matrix product without a column buffer (implicit GEMM).
//
// Output pixels are rows, output channels columns, and the depth of the sums runs over kernel elements and input
// channels of a group: depth = KH * KW * C / groups. A tile of R pixels by NV vectors of channels is summed in
// registers over the whole depth: for each step NV vectors of weights are loaded and R input values broadcast, for R *
// NV multiply-adds. On AVX-512 (32 registers) 6 x 4: 24 multiply-adds for 10 loads, so that arithmetic bounds it, at
// one 512-bit multiply-add a cycle; on AVX2 and SSE (16 registers) 6 x 2.
//
// Weights lie in panels of NV vectors of output channels, [panel][depth][NV * L], so that they are read in order.
// A task is a block of output pixels of one image and group, times some of the panels. Its input is small enough for
// the second-level cache while it meets panel after panel, and a panel is read from beyond that cache once for each
// task.
//
// Panels of great depth (3x3 with 512 channels: 1.2 MB) would be read from beyond the second-level cache for every
// tile. The depth is cut into chunks, and sums wait between them in scratch memory: rows of the kernel, or channels of
// 1x1, where the input of more pixels fits the cache for it (a linear layer of 12544 channels). The last tiles
// of a panel fetch the next panel meanwhile.
//
// 1x1 convolutions read their input where it lies. For others the input of a block is first copied, channels of the
// group side by side, with zeros where the kernel reaches over the border. Then a row of the kernel is one run of KW *
// C numbers (so that a first layer with 3 channels has long runs too), and no loop needs a test for the border.
//
// The depth is counted in words of 32 bits: a word is one float32, or (kPairs) two channels in bfloat16, which one
// instruction multiplies with two and adds to a float32 sum. This is included by conv2d_gemm_kernels.cpp,
// conv2d_bf16_kernels.cpp and conv2d_amx_kernels.cpp (kTiles), which say which; before it they include what sums a row
// of pixels, in vector registers (conv2d_gemm_row.h) or in tiles (conv2d_amx_row.h).
#pragma once

#include "../common/channel_block.h"
#include "conv2d_gemm_plan.h"

namespace fastcv::FASTCV_ISA {
namespace {

// ---- a task ---------------------------------------------------------------------------------------------------------

// n channels, a vector or what is left of one, to words from `to` on.
FASTCV_INLINE void store_words(Vec<float> x, int n, float* to) {
  if constexpr (kPairs) {
    bfloat16_t pairs[L];  // channels after n are zero
    store(pairs, x);
    memcpy(to, pairs, sizeof pairs);  // whole: what follows is written later, or room for it
  } else if (n == L) {
    store(to, x);
  } else {
    store_first(to, x, n);
  }
}

// Whether pixels are words already.
bool is_copied(const Conv2d& conv) { return conv.input.packed == kPairs && !conv.shape.input_norm; }

// The channels of a pixel as words; normed: relu(x * scale + shift) of them.
FASTCV_INLINE void copy_pixel(const Conv2d& conv, const float* from, int64_t group, float* to) {
  const int64_t channels = conv.shape.group_channels();
  const float *scale = conv.input_scale + group * channels, *shift = conv.input_shift + group * channels;
  constexpr int64_t step = kPairs ? L / 2 : L;
  int64_t i = 0;
  for (; i + L <= channels; i += L, to += step) {
    Vec<float> x = load(from + i);
    if (conv.shape.input_norm) x = max(Vec<float>{}, fma(x, load(scale + i), load(shift + i)));
    store_words(x, L, to);
  }
  if (const int n = int(channels - i)) {
    Vec<float> x = load_first(from + i, n);
    if (conv.shape.input_norm)
      x = max(Vec<float>{}, fma(x, load_first(scale + i, n), load_first(shift + i, n)));
    store_words(x, n, to);
  }
}

// `count` pixels of three channels, a vector of L / 4 pixels at a time; returns how many of them.
int64_t copy_colours(const float* from, int64_t count, float* to) {
  typename VecN<int32_t, L>::type lanes;
  for (int i = 0; i < L; ++i) lanes[i] = i % 4 == 3 ? L : i / 4 * 3 + i % 4;  // the fourth is zero
  int64_t x = 0;
  for (; x * 3 + L <= count * 3; x += L / 4, to += L / 2)
    store_words(__builtin_shuffle(load(from + x * 3), Vec<float>{}, lanes), L, to);
  return x;
}

// n words of each of `count` pixels, side by side.
void copy_words(const float* from, int64_t step, int64_t count, int64_t n, float* to) {
  if (step == n) n *= count, count = 1;
  for (int64_t i = 0; i < count; ++i, from += step, to += n) memcpy(to, from, size_t(n) * sizeof(float));
}

// The input pixels of `count` output pixels of a flat plan, side by side.
void copy_pixels(const Conv2d& conv, int64_t image, int64_t group, int64_t first, int64_t count, float* to) {
  const Conv2dShape& s = conv.shape;
  for (int64_t i = first; i < first + count; ++i, to += words(s)) {
    const float* from = pixel(conv.input, image, i / s.out_width * s.stride_h, i % s.out_width * s.stride_w);
    if (is_copied(conv))
      memcpy(to, from + group * words(s), size_t(words(s)) * sizeof(float));
    else
      copy_pixel(conv, from + group * s.group_channels(), group, to);
  }
}

// The input of a block of output pixels from (y0, x0): [strip_h][strip_w][channels of the group], zero outside the map.
void copy_strip(const Conv2d& conv, const Plan& p, int64_t image, int64_t group, int64_t y0, int64_t x0, float* strip) {
  const Conv2dShape& s = conv.shape;
  const int64_t channels = words(s), top = y0 * s.stride_h - s.pad_h, left = x0 * s.stride_w - s.pad_w;
  const int64_t first = min_of(p.strip_w, max_of(0, -left)), last = max_of(first, min_of(p.strip_w, s.width - left));
  for (int64_t i = 0; i < p.strip_h; ++i) {
    float* row = strip + i * p.strip_w * channels;
    const int64_t k = min_of(i / p.row_step, s.kernel_h - 1), y = top + k * s.dilation_h + i - k * p.row_step;
    if (y < 0 || y >= s.height || first == last) {
      memset(row, 0, size_t(p.strip_w * channels) * sizeof(float));
      continue;
    }
    const float* from = pixel(conv.input, image, y, 0) + group * (is_copied(conv) ? channels : s.group_channels());
    memset(row, 0, size_t(first * channels) * sizeof(float));
    if (is_copied(conv)) {
      copy_words(from + (left + first) * conv.input.stride_x, conv.input.stride_x, last - first, channels,
                row + first * channels);
    } else {
      const bool colours = kPairs && s.channels == 3 && conv.input.stride_x == 3 && !s.input_norm;
      int64_t x = first;
      if (colours) x += copy_colours(from + (left + first) * 3, last - first, row + first * channels);
      for (; x < last; ++x)
        copy_pixel(conv, from + (left + x) * conv.input.stride_x, group, row + x * channels);
    }
    memset(row + last * channels, 0, size_t((p.strip_w - last) * channels) * sizeof(float));
  }
}

// Pixels (y, x) to (y, x + count) of the output for one panel; in a flat plan x counts through the whole image.
struct Rows {
  const Conv2d& conv;
  const Plan& plan;
  int64_t image, group, panel;
  int64_t begin = 0;  // of the chunk, in the depth

  // fetch: the next panel's weights, meanwhile.
  void run(Tile t, int64_t y, int64_t x, int64_t count, bool fetch) const {
    const Conv2dShape& s = conv.shape;
    const int64_t channel = group * s.group_outputs() + panel * kColumns;
    const int64_t columns = min_of(kColumns, s.group_outputs() - panel * kColumns), vectors = ceil_div(columns, L);
    t.conv = &conv;
    t.weight =
        conv.weight + plan.depth * (group * ceil_div(s.group_outputs(), L) * L + panel * kColumns) +
        begin * vectors * L;
    if (fetch) t.next = t.weight + plan.depth * vectors * L;
    t.bias = conv.bias ? conv.bias + channel : nullptr;
    t.last = int(columns - (vectors - 1) * L);
    t.output = pixel(conv.output, image, y, x) + (conv.output.packed ? channel / 2 : channel);
    t.output_step = conv.output.stride_x;
    t.residual = conv.residual.data
                     ? pixel(conv.residual, image, y, x) + (conv.residual.packed ? channel / 2 : channel)
                     : nullptr;
    t.residual_step = conv.residual.stride_x;
    run_row(t, count, int(vectors));
  }
};

// Rows of a map follow each other without a gap.
template <class T>
bool one_row(const PixelMap<T>& map, int64_t width) {
  return !map.data || map.stride_y == width * map.stride_x;
}

// One panel of a block; t has its part of the depth.
void run_chunk(const Conv2d& conv, const Plan& p, const Rows& rows, Tile t, int64_t y0, int64_t x0,
               const float* strip) {
  const Conv2dShape& s = conv.shape;
  float* const partial = t.partial;
  const bool whole = (!p.in_place || one_row(conv.input, s.width)) && one_row(conv.output, s.out_width) &&
                     one_row(conv.residual, s.out_width);
  if (p.flat && !whole) {
    for (int64_t at = x0, end = min_of(x0 + p.block_w, s.out_height * s.out_width); at < end;) {
      const int64_t y = at / s.out_width, x = at % s.out_width, count = min_of(end - at, s.out_width - x);
      t.input = p.in_place ? strip + y * conv.input.stride_y + x * conv.input.stride_x : strip + (at - x0) * t.step;
      if (partial) t.partial = partial + (at - x0) * kColumns;
      rows.run(t, y, x, count, at + count == end);
      at += count;
    }
    return;
  }
  const int64_t height = p.flat ? 1 : s.out_height, width = p.flat ? s.out_height * s.out_width : s.out_width;
  const int64_t end = min_of(y0 + p.block_h, height), count = min_of(p.block_w, width - x0);
  for (int64_t y = y0; y < end; ++y) {
    t.input = p.in_place ? strip + x0 * t.step : strip + (y - y0) * s.stride_h * p.strip_w * words(s);
    if (partial) t.partial = partial + (y - y0) * p.block_w * kColumns;
    rows.run(t, y, x0, count, y + 1 == end);
  }
}

// The part of the depth that one chunk is, for panels from rows.panel to `last`. strip: the copied input, or the input
// of the image and group where it is read in place; partial: room for sums of block_h * block_w pixels for each panel.
void run_panels(const Conv2d& conv, const Plan& p, Rows rows, int64_t last, int64_t chunk, int64_t y0, int64_t x0,
                const float* strip, float* partial) {
  const Conv2dShape& s = conv.shape;
  const int64_t channels = words(s), length = s.kernel_h > 1 ? s.kernel_h : p.flat ? channels : 1;
  const int64_t from = length * chunk / p.chunks, to = length * (chunk + 1) / p.chunks;
  const bool whole_rows = p.flat || s.dilation_w == 1;
  Tile t(conv.activation);
  t.first = chunk == 0, t.final = chunk + 1 == p.chunks;
  t.step = p.in_place ? conv.input.stride_x : p.flat ? channels : s.stride_w * channels;
  t.runs_y = p.flat ? 1 : to - from, t.runs_x = whole_rows ? 1 : s.kernel_w;
  t.run_y = p.row_step * p.strip_w * channels, t.run_x = s.dilation_w * channels;
  t.run = p.flat ? to - from : whole_rows ? s.kernel_w * channels : channels;
  rows.begin = p.flat ? from : from * s.kernel_w * channels;
  strip += p.flat ? from : from * t.run_y;
  const int64_t first = rows.panel;
  for (; rows.panel < last; ++rows.panel, partial += p.block_h * p.block_w * kColumns) {
    t.partial = p.chunks > 1 ? partial : nullptr;
    t.fetch = p.in_place && rows.panel == first;
    run_chunk(conv, p, rows, t, y0, x0, strip);
  }
}

int64_t weight_words(const Conv2dShape& s) {
  return s.groups * ceil_div(s.group_outputs(), L) * L * s.kernel_h * s.kernel_w * words(s);
}

// Of the columns k to k + L of a group: a few elements of their filters at a time are transposed into a block.
void prepare_columns(const float* filters, const float* scale, int64_t channels, int64_t taps, int columns, float* to,
                     int64_t step) {
  constexpr int64_t kElements = 128;
  alignas(64) float block[kElements * L];
  const Vec<float> factor = scale ? load_some(scale, columns) : broadcast(1.0f);
  for (int64_t first = 0; first < channels * taps; first += kElements) {
    const int64_t n = min_of(kElements, channels * taps - first);
    pack(filters + first, channels * taps, 1, n, columns, block);
    for (int64_t i = 0, c = first / taps, tap = first % taps; i < n; ++i) {
      store(to + (tap * channels + c) * step, factor * load(block + i * L));
      if (++tap == taps) tap = 0, ++c;
    }
  }
}

// The same rounded, two channels to a word.
void prepare_pairs(const float* filters, const float* scale, int64_t channels, int64_t taps, int columns, float* to,
                   int64_t step) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; c += 2, to += step)
      for (int n = 0; n < L; ++n) {
        bfloat16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const bool there = n < columns && c + i < channels;
          from_accumulate(there ? filters[(n * channels + c + i) * taps + tap] * (scale ? scale[n] : 1) : 0, pair + i);
        }
        memcpy(to + n, pair, 4);
      }
}

void prepare_weights(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) {
  const int64_t channels = s.group_channels(), taps = s.kernel_h * s.kernel_w, rows = taps * words(s);
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t n0 = 0; n0 < s.group_outputs(); n0 += kColumns) {
      const int64_t columns = min_of(kColumns, s.group_outputs() - n0), step = ceil_div(columns, L) * L;
      for (int64_t n = 0; n < columns; n += L) {
        const int64_t k = g * s.group_outputs() + n0 + n;
        const auto prepare = kPairs ? prepare_pairs : prepare_columns;
        prepare(weight + k * channels * taps, scale ? scale + k : nullptr, channels, taps, int(min_of(L, columns - n)),
                prepared + n, step);
      }
      prepared += rows * step;
    }
}

int64_t count_tasks(const Conv2dShape& s) {
  const Plan p = make_plan(s);
  return s.images * s.groups * p.blocks_y * p.blocks_x * p.panel_groups;
}

int64_t strip_size(const Conv2dShape& s, const Plan& p) {
  const int64_t after = kTiles ? 2 * kTileRows * s.stride_w : 0;  // pixels that are read, and not used
  return p.in_place ? 0 : ceil_div((p.strip_h * p.strip_w + after) * words(s), L) * L + (kPairs ? L : 0);
}

int64_t scratch_size(const Conv2dShape& s) {
  const Plan p = make_plan(s);
  const int64_t sums = p.group_panels * p.block_h * p.block_w + (kTiles ? 2 * kTileRows : 0);
  return strip_size(s, p) + (p.chunks > 1 ? sums * kColumns : 0);
}

void run_tasks(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) {
  const Conv2dShape& s = conv.shape;
  const Plan p = make_plan(s);
  for (int64_t i = begin; i < end; ++i) {
    int64_t t = i;
    const int64_t panel_group = t % p.panel_groups, x = (t /= p.panel_groups) % p.blocks_x;
    const int64_t y = (t /= p.blocks_x) % p.blocks_y, group = (t /= p.blocks_y) % s.groups;
    const int64_t image = t / s.groups, y0 = y * p.block_h, x0 = x * p.block_w;
    if (p.flat && !p.in_place)
      copy_pixels(conv, image, group, x0, min_of(p.block_w, s.out_height * s.out_width - x0), scratch);
    else if (!p.in_place)
      copy_strip(conv, p, image, group, y0, x0, scratch);
    const float* strip =
        p.in_place ? conv.input.data + image * conv.input.stride_n + group * s.group_channels() : scratch;
    const int64_t panel = panel_group * p.group_panels, last = min_of(p.panels, panel + p.group_panels);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
      run_panels(conv, p, Rows{conv, p, image, group, panel}, last, chunk, y0, x0, strip, scratch + strip_size(s, p));
  }
  if (conv.stream) stream_end();
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA

#define FASTCV_GEMM(name)                                                                               \
  int64_t name##_weights(const Conv2dShape& s) { return weight_words(s); }                              \
  void name##_prepare(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) { \
    prepare_weights(s, weight, scale, prepared);                                                        \
  }                                                                                                     \
  int64_t name##_tasks(const Conv2dShape& s) { return count_tasks(s); }                                 \
  int64_t name##_scratch(const Conv2dShape& s) { return scratch_size(s); }                              \
  void name(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) { run_tasks(conv, begin, end, scratch); }
