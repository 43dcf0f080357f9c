// 1x1 convolution of few pixels: a linear layer on few vectors, the gate of a squeeze-and-excitation block.
//
// Reading the weights bounds it (25088 x 4096, VGG's first: 411 MB, 11 ms at 37 GB/s), and every weight is used once
// for each pixel. So they are read where they lie, [K][C], and need no other layout (nor a second copy): kRows rows at
// a time as streams, each multiplied with all pixels, lanes added at the end.
#include "conv2d_epilogue.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int kRows = 4, kPixels = 4;
constexpr int64_t kTaskWeights = 64 * 1024;

int64_t task_rows(const Conv2dShape& s) {
  const int64_t rows = kTaskWeights / s.channels / kRows * kRows;
  return rows < kRows ? kRows : rows;
}

FASTCV_INLINE float add_lanes(Vec<float> v) {
  float lanes[L];
  store(lanes, v);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Rows k to k + kRows (those from s.out_channels on repeat the last) times P pixels from x on.
template <int P>
void run_rows(const Conv2d& conv, int64_t x, int64_t k) {
  const Conv2dShape& s = conv.shape;
  const float *in[P], *weight[kRows];
  for (int p = 0; p < P; ++p) in[p] = conv.input.data + (x + p) * conv.input.stride_x;
  for (int r = 0; r < kRows; ++r) weight[r] = conv.weight + min_of(k + r, s.out_channels - 1) * s.channels;
  Vec<float> sum[kRows][P] = {};
  int64_t c = 0;
  for (; c + L <= s.channels; c += L) {
    Vec<float> v[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) v[p] = load(in[p] + c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<float> w = load(weight[r] + c);
      __builtin_prefetch(weight[r] + c + 512);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[r][p] = fma(w, v[p], sum[r][p]);
    }
  }
  if (c < s.channels) {
    const int n = int(s.channels - c);
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < P; ++p) sum[r][p] = fma(load_first(weight[r] + c, n), load_first(in[p] + c, n), sum[r][p]);
  }
  for (int p = 0; p < P; ++p) {
    float sums[L] = {};
    for (int r = 0; r < kRows; ++r) sums[r] = add_lanes(sum[r][p]);
    const int n = int(min_of(kRows, s.out_channels - k));
    Vec<float> sum = load(sums);
    if (conv.output_scale) sum *= load_first(conv.output_scale + k, n);
    finish(conv, sum, 0, 0, x + p, k, n);
  }
}

}  // namespace

bool conv2d_gemv_serves(const Conv2dShape& s) {
  return s.images == 1 && s.height == 1 && s.width <= kPixels && s.kernel_h == 1 && s.kernel_w == 1 && s.pad_h == 0 &&
         s.pad_w == 0 && s.stride_w == 1 && s.groups == 1 && !s.input_norm && s.channels >= L;
}

int64_t conv2d_gemv_weights(const Conv2dShape& s) { return s.out_channels * s.channels; }

void conv2d_gemv_prepare(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) {
  for (int64_t k = 0; k < s.out_channels; ++k)
    for (int64_t c = 0; c < s.channels; ++c) *prepared++ = *weight++ * (scale ? scale[k] : 1);
}

int64_t conv2d_gemv_tasks(const Conv2dShape& s) { return (s.out_channels + task_rows(s) - 1) / task_rows(s); }

int64_t conv2d_gemv_scratch(const Conv2dShape&) { return 0; }

void conv2d_gemv(const Conv2d& conv, int64_t begin, int64_t end, float*) {
  const Conv2dShape& s = conv.shape;
  const int64_t rows = task_rows(s), last = min_of(s.out_channels, end * rows);
  for (int64_t k = begin * rows; k < last; k += kRows) switch (s.width) {
      case 1: run_rows<1>(conv, 0, k); break;
      case 2: run_rows<2>(conv, 0, k); break;
      case 3: run_rows<3>(conv, 0, k); break;
      default: run_rows<4>(conv, 0, k); break;
    }
}

}  // namespace fastcv::FASTCV_ISA
