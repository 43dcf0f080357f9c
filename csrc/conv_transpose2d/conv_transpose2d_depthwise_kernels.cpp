// Transposed convolution with one input and one output channel to a group: learned or bilinear upsampling.
//
// A block of outputs in one row, [phases_x][channels], is one run of memory in the output and, for each tap, in the
// weights [KH][KW][channels]: a vector of it is the sum over the taps of a vector of weights times the input pixel's
// channels, which repeat from phase to phase. So that a vector may begin at any channel, where a pixel is no whole
// number of vectors, input rows are first copied with as many channels repeated after each pixel. The weights that a
// row needs stay in the first-level cache for all its blocks. With 2x2 taps kBlocks blocks are computed together, which
// share weights and neighbouring pixels: 14 loads and 4 stores for 16 multiply-adds. Then writing the output to memory
// bounds it.
#include "../conv2d/conv2d_epilogue.h"
#include "conv_transpose2d.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kTaskElements = 64 * 1024;  // outputs
constexpr int kBlocks = 4;

struct Plan {
  BlockRange y, x;
  int64_t height, tasks_y;  // rows of blocks of a task
  int64_t strip_h;          // rows of the input that it reads
  int64_t repeated;         // elements of a copied pixel

  Plan(const Conv2dShape& s, const PhaseRuns& runs)
      : y(runs.y.first, runs.y.count, s.stride_h, s.pad_h, s.out_height),
        x(runs.x.first, runs.x.count, s.stride_w, s.pad_w, s.out_width) {
    const int64_t row = max_of(1, runs.y.count * runs.x.count * (x.end - x.begin) * s.channels);
    height = max_of(1, min_of(y.end - y.begin, kTaskElements / row)), tasks_y = ceil_div(y.end - y.begin, height);
    strip_h = height + (runs.y.taps - 1) * runs.y.step;
    repeated = s.channels % L == 0 ? 0 : s.channels + L;
  }
};

// A row of outputs: taps that lie inside the map, with the input pixels of the first of them for block 0.
struct Row {
  int64_t taps_y, step_y, step_x;  // from the input of one tap to that of the next, backwards
  int64_t pixel;                   // from one input pixel to the next
  const float *input, *weight;
  int64_t weight_y, weight_x;
  const float* bias;  // [channels + L], repeated as pixels are
};

// Columns first to last of a block. T: taps along both axes, 0: taps_y and taps_x.
template <int T>
FASTCV_INLINE void run_columns(const Conv2d& conv, const Row& row, int64_t taps_y, int64_t taps_x, const float* input,
                               const float* weight, int64_t first, int64_t last, float* output, const float* residual) {
  const int64_t channels = conv.shape.channels;
  const Bounds bounds(conv.activation);
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  const bool exact = bounds.exact && !residual;
  int64_t c = first % channels;
  for (int64_t at = first; at < last; at += L) {
    Vec<float> sum = load(row.bias + c);
    const float *in_y = input + c, *w_y = weight + at;
#pragma GCC unroll 2
    for (int64_t ty = 0; ty < (T ? T : taps_y); ++ty, in_y -= row.step_y, w_y += row.weight_y) {
      const float *in = in_y, *w = w_y;
#pragma GCC unroll 2
      for (int64_t tx = 0; tx < (T ? T : taps_x); ++tx, in -= row.step_x, w += row.weight_x)
        sum = fma(load(in), load(w), sum);
    }
    if (exact && at + L <= last)
      store(output + at, min(high, max(low, sum)));
    else
      finish(conv, sum, nullptr, residual ? residual + at : nullptr, output + at, int(min_of(L, last - at)));
    for (c += L; c >= channels;) c -= channels;
  }
}

// The same of kBlocks blocks, `next` apart in the output, with 2x2 taps; whole vectors, then what is left.
FASTCV_INLINE void run_blocks(const Conv2d& conv, const Row& row, const Bounds& bounds, const float* input,
                              const float* weight, int64_t first, int64_t last, float* output, int64_t next) {
  const int64_t channels = conv.shape.channels;
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  int64_t c = first % channels;
  for (int64_t at = first; at < last; at += L) {
    const int n = int(min_of(L, last - at));
    const Vec<float> bias = load(row.bias + c);
    Vec<float> sum[kBlocks];
#pragma GCC unroll 4
    for (int r = 0; r < kBlocks; ++r) sum[r] = bias;
#pragma GCC unroll 2
    for (int ty = 0; ty < 2; ++ty) {
      const float *in = input + c - ty * row.step_y, *w = weight + at + ty * row.weight_y;
      Vec<float> x[kBlocks + 1];
#pragma GCC unroll 5
      for (int r = 0; r <= kBlocks; ++r) x[r] = load(in + (r - 1) * row.pixel);
      const Vec<float> w0 = load(w), w1 = load(w + row.weight_x);
#pragma GCC unroll 4
      for (int r = 0; r < kBlocks; ++r) sum[r] = fma(x[r], w1, fma(x[r + 1], w0, sum[r]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kBlocks; ++r) {
      const Vec<float> result = min(high, max(low, sum[r]));
      if (n == L)
        store(output + r * next + at, result);
      else
        store_first(output + r * next + at, result, n);
    }
    for (c += L; c >= channels;) c -= channels;
  }
}

// All blocks of the output row oy, at image.
void run_row(const Conv2d& conv, const PhaseRuns& runs, const Plan& p, const Row& row, int64_t image, int64_t oy) {
  const Conv2dShape& s = conv.shape;
  const PhaseRun& x = runs.x;
  const bool joined =
      conv.output.stride_x == s.channels && (!conv.residual.data || conv.residual.stride_x == s.channels);
  const int64_t pixels = joined ? x.count : 1;  // of the output in one go
  const Bounds bounds(conv.activation);
  const bool plain = bounds.exact && !conv.residual.data && row.taps_y == 2 && x.taps == 2 && x.step == 1;
  for (int64_t q = p.x.begin; q < p.x.end; ++q) {
    // Taps t with 0 <= q + base - t * step < width.
    const int64_t reach = q + x.base, after = reach - (s.width - 1);
    const int64_t from = after > 0 ? ceil_div(after, x.step) : 0,
                  to = reach < 0 ? 0 : min_of(x.taps, reach / x.step + 1);
    const int64_t taps = max_of(0, to - from);
    const int64_t ahead = q + kBlocks - 1, left = q * s.stride_w + x.first - s.pad_w;
    if (plain && taps == 2 && left >= 0 && ahead + x.base < s.width &&
        left + (kBlocks - 1) * s.stride_w + x.count <= s.out_width) {
      for (int64_t i = 0; i < x.count; i += pixels)
        run_blocks(conv, row, bounds, row.input + reach * row.pixel, row.weight, i * s.channels,
                   (i + pixels) * s.channels, pixel(conv.output, image, oy, left + i) - i * s.channels,
                   s.stride_w * conv.output.stride_x);
      q = ahead;
      continue;
    }
    const float* input = row.input + (reach - from * x.step) * row.pixel;
    const float* weight = row.weight + from * row.weight_x;
    for (int64_t i = 0; i < x.count; i += pixels) {
      const int64_t ox = q * s.stride_w + x.first - s.pad_w;  // of phase 0
      const int64_t first = max_of(i, -ox), last = min_of(i + pixels, s.out_width - ox);
      if (first >= last) continue;
      float* output = pixel(conv.output, image, oy, ox + i) - i * s.channels;
      const float* residual = conv.residual.data ? pixel(conv.residual, image, oy, ox + i) - i * s.channels : nullptr;
      if (row.taps_y == 2 && taps == 2)
        run_columns<2>(conv, row, 2, 2, input, weight, first * s.channels, last * s.channels, output, residual);
      else
        run_columns<0>(conv, row, row.taps_y, taps, input, weight, first * s.channels, last * s.channels, output,
                       residual);
    }
  }
}

void copy_repeated(const float* from, int64_t channels, float* to) {
  for (int64_t i = 0; i < channels; i += L) {
    const int n = int(min_of(L, channels - i));
    store(to + i, n == L ? load(from + i) : load_first(from + i, n));
  }
  for (int64_t i = 0; i < L; ++i) to[channels + i] = to[i];
}

int64_t strip_width(const Conv2dShape& s, const Plan& p) { return s.width * p.repeated; }

int64_t weight_row(const Conv2dShape& s, const PhaseRuns& runs) { return runs.x.count * s.channels; }

// Blocks y to y + height of an image.
void run_task(const Conv2d& conv, const PhaseRuns& runs, const Plan& p, int64_t image, int64_t y, int64_t height,
              float* scratch) {
  const Conv2dShape& s = conv.shape;
  float *const bias = scratch, *const strip = scratch + s.channels + L;
  memset(bias, 0, size_t(s.channels + L) * sizeof(float));
  if (conv.bias) copy_repeated(conv.bias, s.channels, bias);
  const int64_t top = y + runs.y.base - (runs.y.taps - 1) * runs.y.step;
  if (p.repeated)
    for (int64_t i = max_of(0, top); i < min_of(s.height, y + height + runs.y.base); ++i)
      for (int64_t x = 0; x < s.width; ++x)
        copy_repeated(pixel(conv.input, image, i, x), s.channels,
                      strip + (i - top) * strip_width(s, p) + x * p.repeated);
  Row row{};
  row.bias = bias, row.pixel = p.repeated ? p.repeated : conv.input.stride_x;
  const int64_t line = p.repeated ? strip_width(s, p) : conv.input.stride_y;
  row.step_y = runs.y.step * line, row.step_x = runs.x.step * row.pixel;
  row.weight_x = weight_row(s, runs), row.weight_y = runs.x.taps * row.weight_x;
  for (int64_t q = y; q < y + height; ++q) {
    const int64_t reach = q + runs.y.base, after = reach - (s.height - 1);
    const int64_t from = after > 0 ? ceil_div(after, runs.y.step) : 0;
    const int64_t to = reach < 0 ? 0 : min_of(runs.y.taps, reach / runs.y.step + 1), in_y = reach - from * runs.y.step;
    row.taps_y = max_of(0, to - from);
    row.input = p.repeated ? strip + (in_y - top) * line : conv.input.data + image * conv.input.stride_n + in_y * line;
    for (int64_t i = 0; i < runs.y.count; ++i) {
      const int64_t oy = q * s.stride_h + runs.y.first + i - s.pad_h;
      row.weight = conv.weight + (i * runs.y.taps + from) * row.weight_y;
      if (oy >= 0 && oy < s.out_height) run_row(conv, runs, p, row, image, oy);
    }
  }
}

}  // namespace

int64_t conv_transpose2d_depthwise_weights(const Conv2dShape& s, const PhaseRuns& runs) {
  return runs.y.count * runs.y.taps * runs.x.taps * weight_row(s, runs) + L;  // the last vector may reach over the end
}

void conv_transpose2d_depthwise_prepare(const Conv2dShape& s, const PhaseRuns& runs, const float* weight,
                                        const float* scale, float* prepared) {
  for (int64_t y = 0; y < runs.y.count; ++y)
    for (int64_t ty = 0; ty < runs.y.taps; ++ty)
      for (int64_t tx = 0; tx < runs.x.taps; ++tx)
        for (int64_t x = 0; x < runs.x.count; ++x)
          for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t ky = runs.y.kernel + y + ty * runs.y.kernel_step,
                          kx = runs.x.kernel + x + tx * runs.x.kernel_step;
            const float w = weight[(c * s.kernel_h + ky) * s.kernel_w + kx];
            *prepared++ = scale ? w * scale[c] : w;
          }
  memset(prepared, 0, L * sizeof(float));
}

int64_t conv_transpose2d_depthwise_tasks(const Conv2dShape& s, const PhaseRuns& runs) {
  return s.images * Plan(s, runs).tasks_y;
}

int64_t conv_transpose2d_depthwise_scratch(const Conv2dShape& s, const PhaseRuns& runs) {
  const Plan p(s, runs);
  return s.channels + L + p.strip_h * strip_width(s, p);
}

void conv_transpose2d_depthwise(const Conv2d& conv, const PhaseRuns& runs, int64_t begin, int64_t end, float* scratch) {
  const Plan p(conv.shape, runs);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = p.y.begin + i % p.tasks_y * p.height;
    run_task(conv, runs, p, i / p.tasks_y, y, min_of(p.height, p.y.end - y), scratch);
  }
}

}  // namespace fastcv::FASTCV_ISA
