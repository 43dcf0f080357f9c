// Depthwise convolution: every channel by itself, vectorised over channels.
//
// A tile is R output pixels of P rows (two where the stride is 1) and one vector of channels. The input pixels that the
// tile reaches are loaded into registers once, row by row, and each serves up to P * KW / stride outputs of up to P
// rows; weights lie as [KH][KW][channels] and are loaded once for R pixels. For 3x3, stride 1, R = 8 and P = 2: 144
// multiply-adds, 40 loads of input, 18 of weights. Input and output of a layer are read and written about once, and for
// that (8 bytes per 9 multiply-adds) memory bounds it as soon as a layer leaves the second-level cache.
//
// Rows of 7, 14 and 28 pixels are cut into tiles of 7, others into tiles of 8. Most tiles at a border lack as many
// pixels as "same" padding adds: for those the missing ones are known when this is compiled (Out), the rest asks pixel
// by pixel.
#include "conv2d_epilogue.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kTaskElements = 8 * 1024;   // outputs of a task: less is not worth another thread

int64_t padded_channels(const Conv2dShape& s) { return ceil_div(s.channels, L) * L; }
int64_t task_rows(const Conv2dShape& s) {
  return max_of(min_of(2, s.out_height), min_of(s.out_height, kTaskElements / max_of(1, s.out_width * s.channels)));
}

// Pixels x0 to x0 + R of output rows y to y + P, all channels; those from `valid` on lie outside the output and are not
// stored.
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

// Sums of one vector of channels. P = 2 needs stride and dilation 1.
template <int R, int P, int KW, int SW, class Outside>
FASTCV_INLINE void sum_tile(const Tile& t, int64_t c, int n, Vec<float> (&sum)[P][R]) {
  const Conv2dShape& s = t.conv.shape;
  constexpr int reach = (R - 1) * SW + KW;
  const int64_t x = t.x0 * SW - s.pad_w, channels = padded_channels(s);
  for (int64_t i = 0; i < s.kernel_h + P - 1; ++i) {
    const int64_t y = t.y * s.stride_h - s.pad_h + i * s.dilation_h;
    if (y < 0 || y >= s.height) continue;
    const float* row = pixel(t.conv.input, t.image, y, x) + c;
    Vec<float> in[reach];
#pragma GCC unroll 32
    for (int j = 0; j < reach; ++j) {
      const bool outside = Outside::known ? Outside::misses(j, reach) : x + j < 0 || x + j >= s.width;
      in[j] = outside ? Vec<float>{} : load_channels(row + j * t.conv.input.stride_x, n);
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const int64_t kh = i - p;
      if (P > 1 && (kh < 0 || kh >= s.kernel_h)) continue;
      const float* weight = t.conv.weight + kh * KW * channels + c;
#pragma GCC unroll 8
      for (int kw = 0; kw < KW; ++kw) {
        const Vec<float> w = load(weight + kw * channels);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[p][r] = fma(in[r * SW + kw], w, sum[p][r]);
      }
    }
  }
}

// Any kernel, stride and dilation: every input is loaded for every weight.
template <int R>
FASTCV_INLINE void sum_any(const Tile& t, int64_t c, int n, Vec<float> (&sum)[1][R]) {
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
          sum[0][r] = fma(load_channels(pixel(t.conv.input, t.image, y, x) + c, n), w, sum[0][r]);
      }
    }
}

template <int R>
FASTCV_INLINE void store_row(const Tile& t, int64_t y, int64_t c, int n, const Bounds& bounds, Vec<float> (&sum)[R]) {
  const Conv2d& conv = t.conv;
  const int64_t step = conv.output.stride_x;
  float* output = pixel(conv.output, t.image, y, t.x0) + c;
  const float* residual = conv.residual.data ? pixel(conv.residual, t.image, y, t.x0) + c : nullptr;
  if (bounds.exact && n == L && t.valid == R && !residual) {  // as most are: nothing to ask for each pixel
    const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(output + r * step, min(high, max(low, sum[r])));
    return;
  }
  float sums[R * L];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(sums + r * L, sum[r]);
  finish_tile(conv, sums, t.valid, 1, n, residual, output);
}

template <int R, int P, int KW, int SW, class Outside>
FASTCV_INLINE void run_vector(const Tile& t, int64_t c, int n, const Bounds& bounds) {
  const Vec<float> bias = t.conv.bias ? load_channels(t.conv.bias + c, n) : Vec<float>{};
  Vec<float> sum[P][R];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[p][r] = bias;
  if constexpr (KW > 0)
    sum_tile<R, P, KW, SW, Outside>(t, c, n, sum);
  else
    sum_any<R>(t, c, n, sum);
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) store_row<R>(t, t.y + p, c, n, bounds, sum[p]);
}

template <int R, int P, int KW, int SW, class Outside>
void run_tile(const Tile& t) {
  const Conv2dShape& s = t.conv.shape;
  const Bounds bounds(t.conv.activation);
  int64_t c = 0;
  for (; c + L <= s.channels; c += L) run_vector<R, P, KW, SW, Outside>(t, c, L, bounds);
  if (c < s.channels) run_vector<R, P, KW, SW, Outside>(t, c, int(s.channels - c), bounds);
}

template <int R, int P, int KW, int SW>
void run_rows(const Conv2d& conv, int64_t image, int64_t y) {
  const Conv2dShape& s = conv.shape;
  // Beyond an end of the row where padding is "same": KW / 2 pixels, less for stride 2 and even widths.
  constexpr int kLeft = KW / 2, kRight = SW == 1 ? KW / 2 : KW / 2 - 1;
  for (int64_t x = 0; x < s.out_width; x += R) {
    const Tile t{conv, image, y, x, int(min_of(R, s.out_width - x))};
    const int64_t left = max_of(0, s.pad_w - x * SW);
    const int64_t right = max_of(0, x * SW - s.pad_w + (R - 1) * SW + KW - s.width);
    if (left == 0 && right == 0)
      run_tile<R, P, KW, SW, Out<0, 0>>(t);
    else if (left == kLeft && right == 0)
      run_tile<R, P, KW, SW, Out<kLeft, 0>>(t);
    else if (left == 0 && right == kRight)
      run_tile<R, P, KW, SW, Out<0, kRight>>(t);
    else if (left == kLeft && right == kRight)
      run_tile<R, P, KW, SW, Out<kLeft, kRight>>(t);
    else
      run_tile<R, P, KW, SW, Unknown>(t);
  }
}

void run_general_row(const Conv2d& conv, int64_t image, int64_t y) {
  for (int64_t x = 0; x < conv.shape.out_width; x += 4)
    run_tile<4, 1, 0, 1, Unknown>(Tile{conv, image, y, x, int(min_of(4, conv.shape.out_width - x))});
}

// Pixels of a tile: 32 registers hold sums and input of 8, or of 4 where these are far apart; 16 hold half as many.
template <int KW, int SW, int P>
void run_tiled_rows(const Conv2d& conv, int64_t image, int64_t y) {
  constexpr int kWidth = kVectorBytes == 64 ? (SW == 1 || KW == 3 ? 8 : 4) : (SW == 1 ? 4 : 2);
  if constexpr (kWidth == 8)
    if (conv.shape.out_width % 7 == 0 && conv.shape.out_width % 8) return run_rows<7, P, KW, SW>(conv, image, y);
  run_rows<kWidth, P, KW, SW>(conv, image, y);
}

// Output rows from y to `end`.
template <int KW>
void run_band(const Conv2d& conv, int64_t image, int64_t y, int64_t end) {
  const Conv2dShape& s = conv.shape;
  constexpr bool pairs = KW == 3 || (KW == 5 && kVectorBytes == 64);  // sums of two rows fit the registers
  if (s.stride_w == 1) {
    if (pairs && s.stride_h == 1 && s.dilation_h == 1)
      for (; y + 2 <= end; y += 2) run_tiled_rows<KW, 1, pairs ? 2 : 1>(conv, image, y);
    for (; y < end; ++y) run_tiled_rows<KW, 1, 1>(conv, image, y);
  } else {
    for (; y < end; ++y) run_tiled_rows<KW, 2, 1>(conv, image, y);
  }
}

void run_any_band(const Conv2d& conv, int64_t image, int64_t y, int64_t end) {
  const Conv2dShape& s = conv.shape;
  switch (s.dilation_w == 1 && s.stride_w <= 2 ? s.kernel_w : 0) {
    case 3: return run_band<3>(conv, image, y, end);
    case 5: return run_band<5>(conv, image, y, end);
    case 7: return run_band<7>(conv, image, y, end);
  }
  for (; y < end; ++y) run_general_row(conv, image, y);
}

}  // namespace

int64_t conv2d_depthwise_weights(const Conv2dShape& s) { return s.kernel_h * s.kernel_w * padded_channels(s); }

void conv2d_depthwise_prepare(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) {
  const int64_t taps = s.kernel_h * s.kernel_w, channels = padded_channels(s);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c)
      prepared[tap * channels + c] = c < s.channels ? weight[c * taps + tap] * (scale ? scale[c] : 1) : 0;
}

int64_t conv2d_depthwise_tasks(const Conv2dShape& s) { return s.images * ceil_div(s.out_height, task_rows(s)); }

int64_t conv2d_depthwise_scratch(const Conv2dShape&) { return 0; }

void conv2d_depthwise(const Conv2d& conv, int64_t begin, int64_t end, float*) {
  const Conv2dShape& s = conv.shape;
  const int64_t rows = task_rows(s), bands = ceil_div(s.out_height, rows);
  for (int64_t t = begin; t < end; ++t)
    run_any_band(conv, t / bands, t % bands * rows, min_of(s.out_height, (t % bands + 1) * rows));
}

}  // namespace fastcv::FASTCV_ISA
