// The gradients of deformable convolution's weight and bias.
//
// The weight's is a matrix product over pixels: gradients of the output, a row for each output channel of a group,
// times samples, a column for each channel and kernel element. A block of threads owns a tile of output channels x
// channels at one kernel element, and a part of the pixels; samples are made in shared memory as in the forward pass,
// from points that were found before. Parts of the pixels are as many as give an H200's processors work; their sums are
// added in their order by a second kernel, so that the gradient is the same at every run.
//
// Operations: as many multiply-adds as the forward pass. Floor for 2 images of 256 channels, 100 x 136 pixels, to 256
// channels with 3x3, in float32: 32 GFLOP, 0.53 ms at 60 TFLOP/s. Memory: the sums of the parts, at most 32 KB for each
// of 792 blocks, 26 MB.
#include <numeric>

#include "deform_conv2d_backward_cuda.h"

namespace fastcv::cuda::deform {
namespace {

// The blocks' share: channels of one group and one offset group, and pixels.
struct Shares {
  int channels;
  int64_t pixels;
};

// sums: [parts of the pixels, taps, out_channels, channels of a group]. Blocks: tiles of the share's channels, shares
// of the channels, kernel elements, tiles of output channels, parts of the pixels; the first vary fastest.
template <class T, class Tile, bool kVector>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    deform_conv2d_weight_gradient_kernel(const __grid_constant__ Backward<T> b, const __grid_constant__ Shares shares,
                                         accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  __shared__ typename Tile::Chunk chunks[2];
  const DeformConv2dShape& s = b.shape;
  const Counts& n = b.counts;
  const int tiles = (shares.channels + Tile::kColumns - 1) / Tile::kColumns, all = int(s.channels) / shares.channels;
  const int output_tiles = (n.group_outputs + Tile::kRows - 1) / Tile::kRows;
  int64_t block = blockIdx.x;
  const auto take = [&](int count) {
    const int i = int(block % count);
    block /= count;
    return i;
  };
  const int tile = take(tiles) * Tile::kColumns, first_channel = take(all) * shares.channels + tile;
  const int tap = take(n.taps), first_output = take(output_tiles) * Tile::kRows;
  const int group = first_channel / n.group_channels, offset_group = first_channel / n.offset_group_channels;
  // The thread loads four channels of a pixel, and four output channels once or more, kAcross fours apart.
  constexpr int kAcross = Tile::kColumns / 4;
  const int t = int(threadIdx.x), row = kVector ? t / kAcross : t % Tile::kDepth;
  const int at = 4 * (kVector ? t % kAcross : t / Tile::kDepth);
  const int64_t in_image = s.out_height * s.out_width, end = (block + 1) * shares.pixels;
  const int64_t last_pixel = end < s.pixels() ? end : s.pixels();
  int64_t first_pixel = block * shares.pixels, p = first_pixel + row;
  OutputPixel pixel(s, p);

  Site<T> site{};
  Corners<T> corners;
  Four<T> grads[Tile::kLoads];
  int channels = 0;
  const auto fetch = [&] {
    const bool exists = p < last_pixel;
    channels = exists ? shares.channels - tile - at : 0;
    if (exists) {
      const int64_t of_tap = (pixel.image * s.offset_groups + offset_group) * n.taps + tap;
      Point<A> point = b.points[of_tap * in_image + pixel.y * s.out_width + pixel.x];
      if (on_edge(point)) point.y = kNowhere;
      site = site_of(s, b.input, b.input.data + pixel.image * b.input.stride[0], point);
    }
    corners = load_corners<kVector>(b.input, site, first_channel + at, channels);
    const T* grad = b.grad.data + pixel.in(b.grad.stride);
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int output = first_output + at + 4 * kAcross * i;
      grads[i] = load_four<kVector>(grad + (int64_t(group) * n.group_outputs + output) * b.grad.stride[1],
                                    b.grad.stride[1], exists ? n.group_outputs - output : 0);
    }
  };
  const auto put = [&](typename Tile::Chunk& chunk) {
    *reinterpret_cast<Four<A>*>(&chunk.columns[row][at]) = interpolate(corners, site, channels);
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      Four<A> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.x[j] = to_accumulate(grads[i].x[j]);
      *reinterpret_cast<Four<A>*>(&chunk.rows[row][at + 4 * kAcross * i]) = four;
    }
  };
  const auto next = [&] {
    first_pixel += Tile::kDepth, p += Tile::kDepth;
    pixel.advance(s, Tile::kDepth);
    return first_pixel < last_pixel;
  };
  A sum[Tile::kThreadRows][Tile::kThreadColumns] = {};
  Tile::sum_chunks(chunks, sum, next, fetch, put);

  const int64_t part = block * n.taps + tap;
  const int channel = first_channel - group * n.group_channels;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    const int output = first_output + Tile::row(i);
    A* to = sums + (part * s.out_channels + int64_t(group) * n.group_outputs + output) * n.group_channels + channel;
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j)
      if (output < n.group_outputs && Tile::column(j) < shares.channels - tile) to[Tile::column(j)] = sum[i][j];
  }
}

// Adds the parts up, from [parts, taps, outputs x channels of a group] to [outputs x channels of a group, taps].
template <class A>
__global__ void deform_conv2d_weight_sum_kernel(const A* sums, int64_t parts, int64_t taps, int64_t n, A* grad) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= taps * n) return;
  A sum = 0;
  for (int64_t k = 0; k < parts; ++k) sum += sums[k * taps * n + i];
  grad[i % n * taps + i / n] = sum;
}

// A block sums one output channel, each warp every fourth row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    deform_conv2d_bias_gradient_kernel(const __grid_constant__ Backward<T> b, accumulate_t<T>* grad) {
  using A = accumulate_t<T>;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ A of_warp[kWarps];
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  A sum = 0;
  for (int64_t row = warp; row < b.shape.batch * b.shape.out_height; row += kWarps) {
    const T* at = b.grad.data + row / b.shape.out_height * b.grad.stride[0] + blockIdx.x * b.grad.stride[1] +
                  row % b.shape.out_height * b.grad.stride[2];
    for (int64_t x = lane; x < b.shape.out_width; x += kWarp) sum += load(at + x * b.grad.stride[3]);
  }
#pragma unroll
  for (int k = 1; k < kWarp; k *= 2) sum += __shfl_xor_sync(kAllLanes, sum, k);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int k = 1; k < kWarps; ++k) sum += of_warp[k];
  grad[blockIdx.x] = sum;
}

// ---- shells ---------------------------------------------------------------------------------------------------------

template <class Tile, class T>
Tensor weight_gradient_by(const Stream& stream, const Backward<T>& b, const Tensor& like) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = b.shape;
  Shares shares{std::gcd(b.counts.group_channels, b.counts.offset_group_channels), 0};
  const int64_t tiles = ceil_div(shares.channels, Tile::kColumns) * (s.channels / shares.channels) * s.taps() *
                        ceil_div(s.group_outputs(), Tile::kRows);
  constexpr int64_t kMostBlocks = 792, kLeastPixels = 256;  // twice what an H200 runs at a time
  const int64_t wanted = std::clamp<int64_t>(kMostBlocks / tiles, 1, ceil_div(s.pixels(), kLeastPixels));
  shares.pixels = ceil_div(ceil_div(s.pixels(), wanted), Tile::kDepth) * Tile::kDepth;
  const int64_t parts = ceil_div(s.pixels(), shares.pixels), n = s.out_channels * s.group_channels();
  Tensor sums = empty_on(like, {parts * s.taps() * n}, kAccumulateType<A>);
  Tensor grad = empty_on(like, {s.out_channels, s.group_channels(), s.kernel_h, s.kernel_w}, kAccumulateType<A>);
  const auto kernel = b.vector ? deform_conv2d_weight_gradient_kernel<T, Tile, true>
                               : deform_conv2d_weight_gradient_kernel<T, Tile, false>;
  stream.launch(kernel, {tiles * parts}, kThreads, 0, b, shares, mutable_data<A>(sums));
  stream.launch(deform_conv2d_weight_sum_kernel<A>, {ceil_div(s.taps() * n, kThreads)}, kThreads, 0, data<A>(sums),
                parts, s.taps(), n, mutable_data<A>(grad));
  return grad;
}

}  // namespace

template <class T>
Tensor weight_gradient(const Stream& stream, const Backward<T>& b, const Tensor& like) {
  const DeformConv2dShape& s = b.shape;
  std::optional<Tensor> grad;
  with_tile<accumulate_t<T>>(s.group_outputs(), s.group_channels(), s.groups * s.taps() * ceil_div(s.pixels(), 1024),
                             [&](auto tile) { grad = weight_gradient_by<decltype(tile)>(stream, b, like); });
  return *grad;
}

template <class T>
Tensor bias_gradient(const Stream& stream, const Backward<T>& b, const Tensor& like) {
  using A = accumulate_t<T>;
  Tensor grad = empty_on(like, {b.shape.out_channels}, kAccumulateType<A>);
  stream.launch(deform_conv2d_bias_gradient_kernel<T>, {b.shape.out_channels}, kThreads, 0, b, mutable_data<A>(grad));
  return grad;
}

#define FASTCV_INSTANTIATE(T)                                                           \
  template Tensor weight_gradient<T>(const Stream&, const Backward<T>&, const Tensor&); \
  template Tensor bias_gradient<T>(const Stream&, const Backward<T>&, const Tensor&);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::cuda::deform
