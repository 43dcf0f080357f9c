// Depthwise convolution: every channel by itself, vectorised over channels.
//
// A tile is R output pixels of a row and one vector of channels. For each row of the kernel the input pixels that the tile
// reaches are loaded into registers once, and each serves up to KW / stride outputs; weights lie as [KH][KW][channels] and
// are loaded once for R pixels. For 3x3, stride 1 and R = 8: 72 multiply-adds, 30 loads of input, 9 of weights. Input and
// output of a layer are read and written about once, and for that (8 bytes per 9 multiply-adds) memory bounds it as soon as
// a layer leaves the second-level cache.
//
// Rows of 7, 14 and 28 pixels are cut into tiles of 7, others into tiles of 8. Most tiles at a border lack as many pixels
// as "same" padding adds: for those the missing ones are known when this is compiled (Out), the rest asks pixel by pixel.
#include "conv2d_epilogue.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kTaskElements = 8 * 1024;   // outputs of a task: less is not worth another thread

FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCV_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTCV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded_channels(const Conv2dShape& s) { return ceil_div(s.channels, L) * L; }
int64_t task_rows(const Conv2dShape& s) {
  return max_of(1, min_of(s.out_height, kTaskElements / max_of(1, s.out_width * s.channels)));
}

// Pixels x0 to x0 + R of output row y, all channels; those from `valid` on lie outside the output and are not stored.
struct Tile {
  const Conv2d& conv;
  int64_t image, y, x0;
  int valid;
};

FASTCV_INLINE Vec<float> load_channels(const float* p, int n) { return n == L ? load(p) : load_first(p, n); }

// Input pixels of a tile that lie outside the map, and count as zero: how many at either end.
template <int Left, int Right>
struct Out {
  static constexpr bool known = Left >= 0;
  static constexpr bool misses(int j, int reach) { return j < Left || j >= reach - Right; }
};
using Unknown = Out<-1, -1>;

// Sums of one vector of channels.
template <int R, int KW, int SW, class Outside>
FASTCV_INLINE void sum_tile(const Tile& t, int64_t c, int n, Vec<float> (&sum)[R]) {
  const Conv2dShape& s = t.conv.shape;
  constexpr int reach = (R - 1) * SW + KW;
  const int64_t x = t.x0 * SW - s.pad_w;
  const float* weight = t.conv.weight + c;
  const int64_t channels = padded_channels(s);
  for (int64_t kh = 0; kh < s.kernel_h; ++kh, weight += KW * channels) {
    const int64_t y = t.y * s.stride_h - s.pad_h + kh * s.dilation_h;
    if (y < 0 || y >= s.height) continue;
    const float* row = pixel(t.conv.input, t.image, y, x) + c;
    Vec<float> in[reach];
#pragma GCC unroll 32
    for (int j = 0; j < reach; ++j) {
      const bool outside = Outside::known ? Outside::misses(j, reach) : x + j < 0 || x + j >= s.width;
      in[j] = outside ? Vec<float>{} : load_channels(row + j * t.conv.input.stride_x, n);
    }
#pragma GCC unroll 8
    for (int kw = 0; kw < KW; ++kw) {
      const Vec<float> w = load(weight + kw * channels);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = fma(in[r * SW + kw], w, sum[r]);
    }
  }
}

// Any kernel, stride and dilation: every input is loaded for every weight.
template <int R>
FASTCV_INLINE void sum_any(const Tile& t, int64_t c, int n, Vec<float> (&sum)[R]) {
  const Conv2dShape& s = t.conv.shape;
  const float* weight = t.conv.weight + c;
  const int64_t channels = padded_channels(s);
  for (int64_t kh = 0; kh < s.kernel_h; ++kh)
    for (int64_t kw = 0; kw < s.kernel_w; ++kw, weight += channels) {
      const int64_t y = t.y * s.stride_h - s.pad_h + kh * s.dilation_h;
      const Vec<float> w = load(weight);
      for (int r = 0; r < R; ++r) {
        const int64_t x = (t.x0 + r) * s.stride_w - s.pad_w + kw * s.dilation_w;
        if (y >= 0 && y < s.height && x >= 0 && x < s.width)
          sum[r] = fma(load_channels(pixel(t.conv.input, t.image, y, x) + c, n), w, sum[r]);
      }
    }
}

template <int R>
FASTCV_INLINE void store_tile(const Tile& t, int64_t c, int n, const Bounds& bounds, Vec<float> (&sum)[R]) {
  const Conv2d& conv = t.conv;
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  float* output = pixel(conv.output, t.image, t.y, t.x0) + c;
  const float* residual = conv.residual.data ? pixel(conv.residual, t.image, t.y, t.x0) + c : nullptr;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= t.valid) break;
    if (bounds.exact && n == L)
      store(output, min(high, max(low, residual ? sum[r] + load(residual) : sum[r])));
    else
      finish(conv, sum[r], nullptr, residual, output, n);
    output += conv.output.stride_x;
    if (residual) residual += conv.residual.stride_x;
  }
}

template <int R, int KW, int SW, class Outside>
FASTCV_INLINE void run_vector(const Tile& t, int64_t c, int n, const Bounds& bounds) {
  const Vec<float> bias = t.conv.bias ? load_channels(t.conv.bias + c, n) : Vec<float>{};
  Vec<float> sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = bias;
  if constexpr (KW > 0)
    sum_tile<R, KW, SW, Outside>(t, c, n, sum);
  else
    sum_any<R>(t, c, n, sum);
  store_tile<R>(t, c, n, bounds, sum);
}

template <int R, int KW, int SW, class Outside>
void run_tile(const Tile& t) {
  const Conv2dShape& s = t.conv.shape;
  const Bounds bounds(t.conv.activation);
  int64_t c = 0;
  for (; c + L <= s.channels; c += L) run_vector<R, KW, SW, Outside>(t, c, L, bounds);
  if (c < s.channels) run_vector<R, KW, SW, Outside>(t, c, int(s.channels - c), bounds);
}

template <int R, int KW, int SW>
void run_row(const Conv2d& conv, int64_t image, int64_t y) {
  const Conv2dShape& s = conv.shape;
  // Beyond an end of the row where padding is "same": KW / 2 pixels, less for stride 2 and even widths.
  constexpr int kLeft = KW / 2, kRight = SW == 1 ? KW / 2 : KW / 2 - 1;
  for (int64_t x = 0; x < s.out_width; x += R) {
    const Tile t{conv, image, y, x, int(min_of(R, s.out_width - x))};
    const int64_t left = max_of(0, s.pad_w - x * SW);
    const int64_t right = max_of(0, x * SW - s.pad_w + (R - 1) * SW + KW - s.width);
    if (left == 0 && right == 0)
      run_tile<R, KW, SW, Out<0, 0>>(t);
    else if (left == kLeft && right == 0)
      run_tile<R, KW, SW, Out<kLeft, 0>>(t);
    else if (left == 0 && right == kRight)
      run_tile<R, KW, SW, Out<0, kRight>>(t);
    else if (left == kLeft && right == kRight)
      run_tile<R, KW, SW, Out<kLeft, kRight>>(t);
    else
      run_tile<R, KW, SW, Unknown>(t);
  }
}

void run_general_row(const Conv2d& conv, int64_t image, int64_t y) {
  for (int64_t x = 0; x < conv.shape.out_width; x += 4)
    run_tile<4, 0, 1, Unknown>(Tile{conv, image, y, x, int(min_of(4, conv.shape.out_width - x))});
}

// Pixels of a tile: 32 registers hold sums and input of 8, or of 4 where these are far apart; 16 hold half as many.
template <int KW, int SW>
void run_tiled_row(const Conv2d& conv, int64_t image, int64_t y) {
  constexpr int kRows = kVectorBytes == 64 ? (SW == 1 || KW == 3 ? 8 : 4) : (SW == 1 ? 4 : 2);
  if constexpr (kRows == 8)
    if (conv.shape.out_width % 7 == 0 && conv.shape.out_width % 8) return run_row<7, KW, SW>(conv, image, y);
  run_row<kRows, KW, SW>(conv, image, y);
}

void run_any_row(const Conv2d& conv, int64_t image, int64_t y) {
  const Conv2dShape& s = conv.shape;
  const bool one = s.stride_w == 1, plain = s.dilation_w == 1 && (one || s.stride_w == 2);
  switch (plain ? s.kernel_w : 0) {
    case 3: return one ? run_tiled_row<3, 1>(conv, image, y) : run_tiled_row<3, 2>(conv, image, y);
    case 5: return one ? run_tiled_row<5, 1>(conv, image, y) : run_tiled_row<5, 2>(conv, image, y);
    case 7: return one ? run_tiled_row<7, 1>(conv, image, y) : run_tiled_row<7, 2>(conv, image, y);
    default: return run_general_row(conv, image, y);
  }
}

}  // namespace

int64_t conv2d_depthwise_weights(const Conv2dShape& s) { return s.kernel_h * s.kernel_w * padded_channels(s); }

void conv2d_depthwise_prepare(const Conv2dShape& s, const float* weight, float* prepared) {
  const int64_t taps = s.kernel_h * s.kernel_w, channels = padded_channels(s);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) prepared[tap * channels + c] = c < s.channels ? weight[c * taps + tap] : 0;
}

int64_t conv2d_depthwise_tasks(const Conv2dShape& s) { return s.images * ceil_div(s.out_height, task_rows(s)); }

int64_t conv2d_depthwise_scratch(const Conv2dShape&) { return 0; }

void conv2d_depthwise(const Conv2d& conv, int64_t begin, int64_t end, float*) {
  const Conv2dShape& s = conv.shape;
  const int64_t rows = task_rows(s), bands = ceil_div(s.out_height, rows);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t y = t % bands * rows; y < min_of(s.out_height, (t % bands + 1) * rows); ++y) run_any_row(conv, t / bands, y);
}

}  // namespace fastcv::FASTCV_ISA
