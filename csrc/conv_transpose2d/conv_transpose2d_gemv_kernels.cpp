// Transposed convolution of maps of one pixel in few images: the product of a vector for each and a matrix.
//
// Output (k, ky, kx) is the sum of input[c] * weight[c][k][ky][kx] over the channels: every weight is used once for each
// image, and reading them bounds it (DeconvNet's first, 4096 to 512 channels, 7x7: 411 MB, 11 ms at 37 GB/s). So they
// are read where they lie, need no other layout, and there is no second copy of them.
//
// A task has some outputs, whose weights are kColumns side by side in the row of a channel. It takes kDepth rows at a
// time, as streams, and adds them to the sums of all images, which stay in the first-level cache, a tile of them in
// registers. What a row of sums has in the order [k][ky][kx] is turned into pixels at the end.
//
// Measured (2 cores of a Xeon with AMX): that layer 17.7 ms, 27.4 from weights laid out for a matrix product, 130 by
// torch; 512 to 512 channels, 4x4: 0.49, 0.77 and 1.5 ms. From 16 images on the product of phases is faster.
#include "../common/channel_block.h"
#include "../conv2d/conv2d_epilogue.h"
#include "../conv2d/conv2d_tile.h"
#include "conv_transpose2d.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int kDepth = 8;
constexpr int64_t kColumns = 1024, kMostSums = 64 * 1024, kMostImages = 32;

int64_t taps(const Conv2dShape& s) { return s.kernel_h * s.kernel_w; }

int64_t task_outputs(const Conv2dShape& s) { return min_of(s.out_channels, max_of(1, kColumns / taps(s))); }

// One line more: those of images lie in different sets of the cache, and squares of the last outputs end in it.
int64_t row_of_sums(const Conv2dShape& s) { return ceil_div(task_outputs(s) * taps(s), L) * L + L; }

int64_t images_at_once(const Conv2dShape& s) {
  return max_of(1, min_of(min_of(s.images, kMostImages), kMostSums / row_of_sums(s)));
}

struct Rows {
  const float* input;  // of the first image and channel
  int64_t image;       // to the next one's
  const float* weight;
  int64_t channel;     // to the next one's
  float* sums;
  int64_t row;         // to the next image's
  int64_t images, columns;
};

// sums[r][v] += input[r] * weight over `depth` channels; of the last vector n lanes.
template <int R, int NV, bool Whole = true>
FASTCV_INLINE void add_tile(const Rows& t, int64_t image, int64_t column, int depth, int n = L) {
  Vec<float> sum[R][NV];
  float* const to = t.sums + image * t.row + column;
  const float *in = t.input + image * t.image, *weight = t.weight + column;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) sum[r][v] = load(to + r * t.row + v * L);
  for (int c = 0; c < depth; ++c, weight += t.channel, ++in) {
    Vec<float> w[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) w[v] = Whole ? load(weight + v * L) : load_first(weight + v * L, n);
    if (image == 0)
      for (int v = 0; v < NV; ++v) __builtin_prefetch(weight + kDepth * t.channel + v * L, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<float> x = broadcast(in[r * t.image]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(to + r * t.row + v * L, sum[r][v]);
}

template <int R>
void add_columns(const Rows& t, int64_t image, int depth) {
  int64_t n = 0;
  for (; n + kPanel <= t.columns; n += kPanel) add_tile<R, kPanelVectors>(t, image, n, depth);
  for (; n + L <= t.columns; n += L) add_tile<R, 1>(t, image, n, depth);
  if (n < t.columns) add_tile<R, 1, false>(t, image, n, depth, int(t.columns - n));
}

template <int R>
void add_images(const Rows& t, int64_t image, int depth) {
  for (; image + R <= t.images; image += R) add_columns<R>(t, image, depth);
  if constexpr (R > 1)
    if (image < t.images) add_images<R - 1>(t, image, depth);
}

// Outputs k to k + n at one pixel.
void store_pixel(const Conv2d& conv, int64_t image, int64_t y, int64_t x, int64_t k, int n, Vec<float> sum) {
  if (y < 0 || y >= conv.shape.out_height || x < 0 || x >= conv.shape.out_width) return;
  if (conv.output_scale) sum *= load_first(conv.output_scale + k, n);
  finish(conv, sum, image, y, x, k, n);
}

bool meets(int64_t at, int64_t pad, int64_t dilation, int64_t size) {
  return (at + pad) % dilation == 0 && (at + pad) / dilation < size;
}

// Pixels that no element of the kernel meets.
void store_others(const Conv2d& conv, int64_t image, int64_t k, int n) {
  const Conv2dShape& s = conv.shape;
  for (int64_t y = 0; y < s.out_height; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      if (!meets(y, s.pad_h, s.dilation_h, s.kernel_h) || !meets(x, s.pad_w, s.dilation_w, s.kernel_w))
        store_pixel(conv, image, y, x, k, n, Vec<float>{});
}

// Sums [outputs][KH * KW] to pixels, in squares of kLanes x kLanes.
void store_image(const Conv2d& conv, int64_t image, int64_t first, int64_t outputs, const float* sums) {
  const Conv2dShape& s = conv.shape;
  const int64_t each = taps(s);
  const bool others = s.dilation_h * s.dilation_w > 1 || s.out_height + s.pad_h > s.kernel_h ||
                      s.out_width + s.pad_w > s.kernel_w;
  for (int64_t k = 0; k < outputs; k += L) {
    const int n = int(min_of(L, outputs - k));
    for (int64_t tap = 0; tap < each; tap += L) {
      Vec<float> square[L];
      for (int i = 0; i < L; ++i) square[i] = load(sums + min_of(k + i, outputs - 1) * each + tap);
      transpose(square);
      for (int64_t i = 0; i < min_of(L, each - tap); ++i)
        store_pixel(conv, image, (tap + i) / s.kernel_w * s.dilation_h - s.pad_h,
                    (tap + i) % s.kernel_w * s.dilation_w - s.pad_w, first + k, n, square[i]);
    }
    if (others) store_others(conv, image, first + k, n);
  }
}

}  // namespace

int64_t conv_transpose2d_gemv_tasks(const Conv2dShape& s) { return ceil_div(s.out_channels, task_outputs(s)); }

int64_t conv_transpose2d_gemv_scratch(const Conv2dShape& s) { return images_at_once(s) * row_of_sums(s); }

void conv_transpose2d_gemv(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) {
  const Conv2dShape& s = conv.shape;
  const int64_t each = task_outputs(s), at_once = images_at_once(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * each, outputs = min_of(each, s.out_channels - first);
    for (int64_t image = 0; image < s.images; image += at_once) {
      Rows t{};
      t.image = conv.input.stride_n, t.channel = s.out_channels * taps(s);
      t.sums = scratch, t.row = row_of_sums(s);
      t.images = min_of(at_once, s.images - image), t.columns = outputs * taps(s);
      memset(scratch, 0, size_t(t.images * t.row) * sizeof(float));
      for (int64_t c = 0; c < s.channels; c += kDepth) {
        t.input = pixel(conv.input, image, 0, 0) + c, t.weight = conv.weight + c * t.channel + first * taps(s);
        add_images<tile_rows(kPanelVectors)>(t, 0, int(min_of(kDepth, s.channels - c)));
      }
      for (int64_t i = 0; i < t.images; ++i) store_image(conv, image + i, first, outputs, scratch + i * t.row);
    }
  }
}

}  // namespace fastcv::FASTCV_ISA
