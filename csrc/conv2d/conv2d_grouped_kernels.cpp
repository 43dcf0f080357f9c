// 3x3 convolution in groups of 2, 4, 8 or 16 channels (ResNeXt, RegNet), as many out as in; at most a vector's lanes.
//
// A vector holds the channels of several groups side by side, of the output and at the same place of the input. Input
// channel i of every group is spread over its group's lanes by one permutation, and multiplies weights that lie as
// [vector][KH][KW][i][lane]. A tile is R output pixels of a row: a spread input serves all outputs that it reaches, so
// that there are R + 2 permutations and 3 loads of weights for 3 R multiply-adds. Arithmetic bounds it, where a matrix
// product would leave all lanes but a group's idle, or load as much as it multiplies where a group fills a vector.
#include "conv2d_epilogue.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>, KW = 3;
constexpr int64_t kTaskSums = 256 * 1024;  // multiply-adds of vectors in a task

int64_t task_rows(const Conv2dShape& s) {
  const int64_t row = s.out_width * ceil_div(s.channels, L) * KW * s.kernel_h * s.group_channels();
  return max_of(1, min_of(s.out_height, kTaskSums / max_of(1, row)));
}

template <int... J>
struct Lanes {};
template <int N, int... J>
struct MakeLanes : MakeLanes<N - 1, N - 1, J...> {};
template <int... J>
struct MakeLanes<0, J...> {
  using type = Lanes<J...>;
};

// Channel i of every group of G, in all lanes of the group.
template <int G, int I, int... J>
FASTCV_INLINE Vec<float> spread(Vec<float> x, Lanes<J...>) {
  return __builtin_shufflevector(x, x, (J / G * G + I)...);
}

struct Tile {
  const Conv2d& conv;
  int64_t image, y, x0;
  int valid;  // pixels inside the output
};

// Of a group that fills a vector, channel i is broadcast from memory; of smaller ones it is spread from registers.
template <int G>
struct Pixel {
  Vec<float> all;
  template <int I>
  FASTCV_INLINE Vec<float> channel() const {
    return spread<G, I>(all, typename MakeLanes<L>::type{});
  }
  FASTCV_INLINE void read(const float* p, int n) { all = n == L ? load(p) : load_first(p, n); }
  FASTCV_INLINE void clear() { all = Vec<float>{}; }
};
alignas(64) constexpr float kZeros[L] = {};
template <>
struct Pixel<L> {
  const float* at;
  template <int I>
  FASTCV_INLINE Vec<float> channel() const {
    return broadcast(at[I]);
  }
  FASTCV_INLINE void read(const float* p, int) { at = p; }
  FASTCV_INLINE void clear() { at = kZeros; }
};

// Channels I and after of the P input pixels that the tile reaches in a row.
template <int R, int SW, int G, int I, int P>
FASTCV_INLINE void add_channels(const Pixel<G> (&in)[P], const float* weight, Vec<float> (&sum)[R]) {
  if constexpr (I < G) {
    Vec<float> w[KW];
#pragma GCC unroll 3
    for (int kw = 0; kw < KW; ++kw) w[kw] = load(weight + (kw * G + I) * L);
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) {
      const Vec<float> x = in[j].template channel<I>();
#pragma GCC unroll 3
      for (int kw = 0; kw < KW; ++kw)
        if ((j - kw) % SW == 0 && j >= kw && (j - kw) / SW < R)
          sum[(j - kw) / SW] = fma(x, w[kw], sum[(j - kw) / SW]);
    }
    add_channels<R, SW, G, I + 1>(in, weight, sum);
  }
}

template <int R, int SW, int G, bool Edge>
FASTCV_INLINE void add_row(const Tile& t, const float* row, int64_t x, int n, const float* weight,
                           Vec<float> (&sum)[R]) {
  constexpr int P = (R - 1) * SW + KW;
  Pixel<G> in[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j)
    if (!Edge || (x + j >= 0 && x + j < t.conv.shape.width))
      in[j].read(row + j * t.conv.input.stride_x, n);
    else
      in[j].clear();
  add_channels<R, SW, G, 0>(in, weight, sum);
}

template <int R, int SW, int G, bool Edge>
FASTCV_INLINE void run_vector(const Tile& t, int64_t c, int n, const Bounds& bounds) {
  const Conv2d& conv = t.conv;
  const Conv2dShape& s = conv.shape;
  const Vec<float> bias = !conv.bias ? Vec<float>{} : n == L ? load(conv.bias + c) : load_first(conv.bias + c, n);
  Vec<float> sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = bias;
  const int64_t x = t.x0 * SW - s.pad_w;
  const float* weight = conv.weight + c * s.kernel_h * KW * G;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh, weight += KW * G * L) {
    const int64_t y = t.y * s.stride_h - s.pad_h + kh;
    if (y < 0 || y >= s.height) continue;
    add_row<R, SW, G, Edge>(t, pixel(conv.input, t.image, y, x) + c, x, n, weight, sum);
  }
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

template <int R, int SW, int G, bool Edge>
void run_tile(const Tile& t) {
  const Bounds bounds(t.conv.activation);
  const int64_t channels = t.conv.shape.channels;
  int64_t c = 0;
  for (; c + L <= channels; c += L) run_vector<R, SW, G, Edge>(t, c, L, bounds);
  if (c < channels) run_vector<R, SW, G, Edge>(t, c, int(channels - c), bounds);
}

template <int R, int SW, int G>
void run_row(const Conv2d& conv, int64_t image, int64_t y) {
  const Conv2dShape& s = conv.shape;
  for (int64_t x = 0; x < s.out_width; x += R) {
    const Tile t{conv, image, y, x, int(min_of(R, s.out_width - x))};
    const int64_t first = x * SW - s.pad_w, last = first + (R - 1) * SW + KW;
    if (first >= 0 && last <= s.width)
      run_tile<R, SW, G, false>(t);
    else
      run_tile<R, SW, G, true>(t);
  }
}

constexpr int kRows = kVectorBytes == 64 ? 7 : 4;

template <int G>
void run_group(const Conv2d& conv, int64_t image, int64_t y) {
  if constexpr (L % G == 0) {
    if (conv.shape.stride_w == 1)
      run_row<kRows, 1, G>(conv, image, y);
    else
      run_row<kRows, 2, G>(conv, image, y);
  }
}

}  // namespace

bool conv2d_grouped_serves(const Conv2dShape& s) {
  const int64_t g = s.group_channels();
  const bool serves = g == 2 || g == 4 || g == 8 || (g == 16 && s.groups > 1);  // one group: Winograd's or a product
  return serves && L % g == 0 && s.group_outputs() == g && s.kernel_w == KW &&
         s.dilation_h == 1 && s.dilation_w == 1 && (s.stride_w == 1 || s.stride_w == 2);
}

int64_t conv2d_grouped_weights(const Conv2dShape& s) {
  return ceil_div(s.channels, L) * L * s.kernel_h * KW * s.group_channels();
}

void conv2d_grouped_prepare(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) {
  const int64_t g = s.group_channels(), taps = s.kernel_h * KW;
  for (int64_t c = 0; c < s.channels; c += L)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < g; ++i)
        for (int64_t lane = c; lane < c + L; ++lane)
          *prepared++ = lane < s.channels ? weight[(lane * g + i) * taps + tap] * (scale ? scale[lane] : 1) : 0;
}

int64_t conv2d_grouped_tasks(const Conv2dShape& s) { return s.images * ceil_div(s.out_height, task_rows(s)); }

int64_t conv2d_grouped_scratch(const Conv2dShape&) { return 0; }

void conv2d_grouped(const Conv2d& conv, int64_t begin, int64_t end, float*) {
  const Conv2dShape& s = conv.shape;
  const int64_t rows = task_rows(s), bands = ceil_div(s.out_height, rows);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t y = t % bands * rows; y < min_of(s.out_height, (t % bands + 1) * rows); ++y)
      switch (s.group_channels()) {
        case 2: run_group<2>(conv, t / bands, y); break;
        case 4: run_group<4>(conv, t / bands, y); break;
        case 8: run_group<8>(conv, t / bands, y); break;
        default: run_group<16>(conv, t / bands, y); break;
      }
}

}  // namespace fastcv::FASTCV_ISA
