// Deformable convolution as an implicit matrix product: weights times samples, without a buffer of columns.
//
// A block of threads owns a tile of output channels (of a group) x output pixels. It goes through the chunks of the
// sum: 8 or 16 channels at one kernel element. The point at which a pixel samples is found once for all channels of an
// offset group, by the threads that sample the pixel. Samples and weights, packed beforehand so that a chunk's follow
// each other, go to shared memory, from where each is read for 8 or 16 threads; the next chunk's pixels are on their
// way to registers while a chunk is multiplied. Sums are in float32 (float64 for float64), in the same order whatever
// the tile.
//
// Operations: a multiply-add for each weight and pixel, and 20 or so for a sample, which serves up to 128 output
// channels. Bytes: input, offset, mask and output, once from memory where tiles that run together share them in the
// second-level cache. Floor for 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3x3, in float32: 32
// GFLOP, 0.53 ms at 60 TFLOP/s; 59 MB, 0.014 ms. Memory beyond the output: the packed weights, in float32, output
// channels of a group rounded up to a multiple of the tile's 16, 64 or 128.
#include "deform_conv2d_cuda.h"

namespace fastcv::cuda::deform {
namespace {

template <class T>
struct Forward {
  using A = accumulate_t<T>;
  DeformConv2dShape shape;
  Counts counts;
  Map<T> input;
  AnyTensor offset, mask;  // mask.data is null where there is none
  const A* weights;        // packed: a row for each channel and kernel element
  int64_t outputs;         // length of such a row: output channels of a group, and padding
  const A* bias;           // [out_channels] or null
  T* output;
  int64_t output_stride[3];  // of images, channels and pixels
};

// One after the other, the chunks of a group's channels. Those that are sampled at the same points follow each other.
struct ChunkWalk {
  int first, last;   // channels of the group in one offset group
  int tap, channel;  // where the chunk begins
  int row;           // of the packed weights
  int group_last;

  __device__ ChunkWalk(const Counts& counts, int group)
      : tap(0), row(group * counts.group_channels * counts.taps), group_last((group + 1) * counts.group_channels) {
    open(counts, group * counts.group_channels);
  }
  __device__ void open(const Counts& counts, int from) {
    const int end = (from / counts.offset_group_channels + 1) * counts.offset_group_channels;
    first = channel = from, last = end < group_last ? end : group_last;
  }
  // False after the last one.
  __device__ bool next(const Counts& counts, int depth) {
    row += last - channel < depth ? last - channel : depth;
    channel += depth;
    if (channel < last) return true;
    channel = first;
    if (++tap < counts.taps) return true;
    tap = 0;
    if (last < group_last) return open(counts, last), true;
    return false;
  }
  __device__ bool at_new_point() const { return channel == first; }
};

// weights[row][output of the group]: rows go by offset group, kernel element, channel.
template <class A>
__global__ void deform_conv2d_pack_kernel(const __grid_constant__ DeformConv2dShape s,
                                          const __grid_constant__ AnyTensor weight, int64_t outputs, A* weights) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, row = i / outputs, output = i % outputs;
  if (row >= s.channels * s.taps()) return;
  const int64_t in_group = s.group_channels(), in_offset_group = s.offset_group_channels();
  const int64_t any = row / s.taps(), group = any / in_group;  // a channel sampled at the same points
  int64_t first = any / in_offset_group * in_offset_group, last = first + in_offset_group;
  first = first > group * in_group ? first : group * in_group;
  last = last < (group + 1) * in_group ? last : (group + 1) * in_group;
  const int64_t k = row - first * s.taps(), tap = k / (last - first), channel = first + k % (last - first);
  const int64_t at = (group * s.group_outputs() + output) * weight.stride[0] + channel % in_group * weight.stride[1] +
                     tap / s.kernel_w * weight.stride[2] + tap % s.kernel_w * weight.stride[3];
  weights[i] = output < s.group_outputs() ? load_element<A>(weight, at) : A(0);
}

template <class T>
__device__ Site<T> find_site(const Forward<T>& f, const OutputPixel& pixel, int offset_group, int tap) {
  using A = accumulate_t<T>;
  const int64_t channel = offset_group * f.counts.taps + tap, at = pixel.in(f.offset.stride);
  const A y = load_element<A>(f.offset, at + 2 * channel * f.offset.stride[1]);
  const A x = load_element<A>(f.offset, at + (2 * channel + 1) * f.offset.stride[1]);
  A mask = 1;
  if (f.mask.data) mask = load_element<A>(f.mask, pixel.in(f.mask.stride) + channel * f.mask.stride[1]);
  Point<A> p = locate(f.shape, pixel.y, pixel.x, tap, y, x, mask);
  if (on_edge(p)) p.y = kNowhere;
  return site_of(f.shape, f.input, f.input.data + pixel.image * f.input.stride[0], p);
}

template <class Tile, class T>
__device__ void write_tile(const Forward<T>& f, int64_t output, int64_t outputs, int64_t pixel,
                           const accumulate_t<T> (&sum)[Tile::kThreadRows][Tile::kThreadColumns]) {
  const int64_t in_image = f.shape.out_height * f.shape.out_width;
#pragma unroll
  for (int j = 0; j < Tile::kThreadColumns; ++j) {
    const int64_t p = pixel + Tile::column(j);
    if (p >= f.shape.pixels()) continue;
    T* to = f.output + p / in_image * f.output_stride[0] + p % in_image * f.output_stride[2];
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) {
      const int64_t o = output + Tile::row(i);
      if (Tile::row(i) < outputs) store(to + o * f.output_stride[1], sum[i][j] + (f.bias ? f.bias[o] : 0));
    }
  }
}

// Blocks: tiles of output channels of a group, groups, tiles of pixels; the first vary fastest.
template <class T, class Tile, bool kVector>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    deform_conv2d_forward_kernel(const __grid_constant__ Forward<T> f) {
  using A = accumulate_t<T>;
  __shared__ typename Tile::Chunk chunks[2];
  const DeformConv2dShape& s = f.shape;
  const int tiles = int(f.outputs / Tile::kRows), tile = int(blockIdx.x) % tiles * Tile::kRows;
  const int64_t block = blockIdx.x / tiles, first_pixel = block / s.groups * Tile::kColumns;
  const int group = int(block % s.groups), t = int(threadIdx.x);
  // The thread samples four channels of one pixel and loads four weights. The last pixel is repeated.
  constexpr int kQuads = Tile::kDepth / 4;
  const int column = kVector ? t / kQuads : t % Tile::kColumns;
  const int channel = 4 * (kVector ? t % kQuads : t / Tile::kColumns);
  const int64_t p = first_pixel + column, last_pixel = s.pixels() - 1;
  const OutputPixel pixel(s, p < last_pixel ? p : last_pixel);

  ChunkWalk walk(f.counts, group);
  Site<T> site{};
  Corners<T> corners;
  Four<A> weights[Tile::kLoads];
  int channels = 0;  // that the thread samples
  const auto fetch = [&] {
    if (walk.at_new_point()) site = find_site(f, pixel, walk.first / f.counts.offset_group_channels, walk.tap);
    channels = walk.last - walk.channel - channel;
    corners = load_corners<kVector>(f.input, site, walk.channel + channel, channels);
    Tile::each_load([&](int i, int row, int at) {
      weights[i] = Four<A>{};
      if (walk.channel + row < walk.last)
        weights[i] = *reinterpret_cast<const Four<A>*>(f.weights + (walk.row + row) * f.outputs + tile + at);
    });
  };
  const auto put = [&](typename Tile::Chunk& chunk) {
    const Four<A> samples = interpolate(corners, site, channels);
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.columns[channel + j][column] = samples.x[j];
    Tile::each_load([&](int i, int row, int at) { *reinterpret_cast<Four<A>*>(&chunk.rows[row][at]) = weights[i]; });
  };
  A sum[Tile::kThreadRows][Tile::kThreadColumns] = {};
  Tile::sum_chunks(chunks, sum, [&] { return walk.next(f.counts, Tile::kDepth); }, fetch, put);
  const int outputs = f.counts.group_outputs;
  write_tile<Tile>(f, int64_t(group) * outputs + tile, outputs - tile, first_pixel, sum);
}

// ---- shell ----------------------------------------------------------------------------------------------------------

template <class Tile, class T>
void launch_forward(const Stream& stream, Forward<T> f, const Tensor& input, const Tensor& weight) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = f.shape;
  const int64_t tiles = ceil_div(s.group_outputs(), Tile::kRows);
  f.outputs = tiles * Tile::kRows;
  const int64_t packed = s.channels * s.taps() * f.outputs;
  const Tensor weights = empty_on(input, {packed}, kAccumulateType<A>);
  f.weights = data<A>(weights);
  stream.launch(deform_conv2d_pack_kernel<A>, {ceil_div(packed, kThreads)}, kThreads, 0, s,
                any_tensor(weight, "weight"), f.outputs, mutable_data<A>(weights));
  const int64_t blocks = tiles * s.groups * ceil_div(s.pixels(), Tile::kColumns);
  const bool vector = lies_in_fours(f.input, s.group_channels()) && s.offset_group_channels() % 4 == 0;
  const auto kernel =
      vector ? deform_conv2d_forward_kernel<T, Tile, true> : deform_conv2d_forward_kernel<T, Tile, false>;
  stream.launch(kernel, {blocks}, kThreads, 0, f);
}

template <class T>
Tensor forward(const DeformConv2dShape& s, const Tensor& input, const Tensor& weight, const Tensor& offset,
               const Tensor* mask, const Tensor& bias) {
  using A = accumulate_t<T>;
  const Stream stream(input);
  Tensor output =
      empty_on(input, {s.batch, s.out_channels, s.out_height, s.out_width}, input.scalar_type(), memory_format(input));
  if (output.numel() == 0) return output;
  const Tensor sums = as_contiguous(bias, kAccumulateType<A>);
  const int64_t in_image = s.out_height * s.out_width;
  Forward<T> f{s, Counts(s), any_map<T>(input), any_tensor(offset, "offset"),
               mask ? any_tensor(*mask, "mask") : AnyTensor{}};
  f.bias = bias.size(0) ? data<A>(sums) : nullptr;
  f.output = mutable_data<T>(output);
  f.output_stride[0] = s.out_channels * in_image;
  f.output_stride[1] = is_channels_last(input) ? 1 : in_image;
  f.output_stride[2] = is_channels_last(input) ? s.out_channels : 1;
  if (s.group_outputs() <= 16)
    launch_forward<Tile<A, 1, 8>>(stream, f, input, weight);
  else
    with_tile<A>(s.group_outputs(), s.pixels(), s.groups,
                 [&](auto tile) { launch_forward<decltype(tile)>(stream, f, input, weight); });
  return output;
}

Tensor deform_conv2d_cuda(const Tensor& input, const Tensor& weight, const Tensor& offset, const Tensor& mask,
                          const Tensor& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                          int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t offset_groups,
                          bool use_mask) {
  const Geometry geometry{stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups};
  const Tensor* modulation = use_mask ? &mask : nullptr;
  const DeformConv2dShape s = check_shape(input, weight, offset, modulation, bias, geometry);
  Tensor output;
  dispatch_floating(input.scalar_type(), "input",
                    [&](auto type) { output = forward<decltype(type)>(s, input, weight, offset, modulation, bias); });
  return output;
}

}  // namespace
}  // namespace fastcv::cuda::deform

FASTCV_CUDA_LIBRARY(m) { m.impl("deform_conv2d", TORCH_BOX(&fastcv::cuda::deform::deform_conv2d_cuda)); }
