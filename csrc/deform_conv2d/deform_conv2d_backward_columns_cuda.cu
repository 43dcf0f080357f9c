// The first step of deformable convolution's backward pass: the gradient of its samples, transposed weights times the
// gradient of the output.
//
// A matrix product, of rows that are kernel elements x channels of a group and columns that are pixels, by tiles like
// the forward pass, with output channels as the depth. It is written pixel by pixel with channels side by side, as
// those who read it go through the channels of a point. Bytes and memory: deform_conv2d_backward_cuda.cu.
// Floor for 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3x3: 32 GFLOP, as in the forward pass, 0.5
// ms at 60 TFLOP/s; 250 MB of columns in float32 are written, 60 us.
#include "deform_conv2d_backward_cuda.h"

namespace fastcv::cuda::deform {
namespace {

// Weights of a slab's channels.
template <class A>
struct PackedSlab {
  int groups;        // of the weights that have channels in the slab
  int64_t length;    // kernel elements x channels of a group that are in the slab, padded to whole tiles
  const A* weights;  // [groups, outputs of a group, length]
};

template <class A>
__global__ void deform_conv2d_pack_slab_kernel(const __grid_constant__ DeformConv2dShape s,
                                               const __grid_constant__ Counts counts,
                                               const __grid_constant__ AnyTensor weight,
                                               const __grid_constant__ Slab<A> slab, int groups, int64_t length,
                                               A* weights) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const int column = int(i % length), output = int(i / length % counts.group_outputs);
  const int64_t of_slab = i / length / counts.group_outputs;
  if (of_slab >= groups) return;
  const int group = slab.first / counts.group_channels + int(of_slab);
  const Range range = intersect(slab, group, counts.group_channels);
  const int channels = range.last - range.first, tap = column / channels;
  const int channel = range.first + column % channels - group * counts.group_channels;
  const int64_t at = (int64_t(group) * counts.group_outputs + output) * weight.stride[0] + channel * weight.stride[1] +
                     tap / int(s.kernel_w) * weight.stride[2] + tap % int(s.kernel_w) * weight.stride[3];
  weights[i] = tap < counts.taps ? load_element<A>(weight, at) : A(0);
}

// Blocks: tiles of a group's columns, the slab's groups, tiles of pixels; the first vary fastest.
template <class T, class Tile, bool kVector>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    deform_conv2d_columns_kernel(const __grid_constant__ Backward<T> b,
                                 const __grid_constant__ Slab<accumulate_t<T>> slab,
                                 const __grid_constant__ PackedSlab<accumulate_t<T>> packed) {
  using A = accumulate_t<T>;
  __shared__ typename Tile::Chunk chunks[2];
  const DeformConv2dShape& s = b.shape;
  const int tiles = int(packed.length / Tile::kRows), tile = int(blockIdx.x) % tiles * Tile::kRows;
  const int of_slab = int(blockIdx.x) / tiles % packed.groups, group = slab.first / b.counts.group_channels + of_slab;
  const int64_t first_pixel = int64_t(int(blockIdx.x) / tiles / packed.groups) * Tile::kColumns;
  const int64_t in_image = s.out_height * s.out_width, pixels = slab.images * in_image;
  // The thread loads four outputs of one pixel. The last pixel is repeated.
  constexpr int kQuads = Tile::kDepth / 4;
  const int t = int(threadIdx.x), column = kVector ? t / kQuads : t % Tile::kColumns, outputs = b.counts.group_outputs;
  const int output = 4 * (kVector ? t % kQuads : t / Tile::kColumns);
  const int64_t p = first_pixel + column < pixels ? first_pixel + column : pixels - 1;
  const T* grad = b.grad.data + OutputPixel(s, slab.first_image * in_image + p).in(b.grad.stride) +
                  (int64_t(group) * outputs + output) * b.grad.stride[1];
  const A* weights = packed.weights + int64_t(of_slab) * outputs * packed.length + tile;

  int first = 0;  // output of the chunk
  Four<T> grads;
  Four<A> of_weights[Tile::kLoads];
  const auto fetch = [&] {
    grads = load_four<kVector>(grad + first * b.grad.stride[1], b.grad.stride[1], outputs - first - output);
    Tile::each_load([&](int i, int row, int at) {
      of_weights[i] = Four<A>{};
      if (first + row < outputs)
        of_weights[i] = *reinterpret_cast<const Four<A>*>(weights + (first + row) * packed.length + at);
    });
  };
  const auto put = [&](typename Tile::Chunk& chunk) {
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.columns[output + j][column] = to_accumulate(grads.x[j]);
    Tile::each_load([&](int i, int row, int at) { *reinterpret_cast<Four<A>*>(&chunk.rows[row][at]) = of_weights[i]; });
  };
  A sum[Tile::kThreadRows][Tile::kThreadColumns] = {};
  Tile::sum_chunks(chunks, sum, [&] { return (first += Tile::kDepth) < outputs; }, fetch, put);

  const Range range = intersect(slab, group, b.counts.group_channels);
  const int channels = range.last - range.first;
  const bool fours = channels % 4 == 0 && slab.channels() % 4 == 0 && (range.first - slab.first) % 4 == 0;
#pragma unroll
  for (int j = 0; j < Tile::kThreadColumns; ++j) {
    const int64_t at = first_pixel + Tile::column(j);
    if (at >= pixels) continue;
    A* to = slab.columns + (at / in_image * b.counts.taps * in_image + at % in_image) * slab.channels() + range.first -
            slab.first;
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; i += 4)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = tile + Tile::row(i + k), tap = row / channels;
        A* const element = to + tap * in_image * slab.channels() + row % channels;
        if (tap >= b.counts.taps) continue;
        if (!fours) {
          *element = sum[i + k][j];
        } else if (k == 0) {
          *reinterpret_cast<Four<A>*>(element) = {sum[i][j], sum[i + 1][j], sum[i + 2][j], sum[i + 3][j]};
        }
      }
  }
}

template <class Tile, class T>
void make_columns_by(const Stream& stream, const Backward<T>& b, const Tensor& weight,
                     const Slab<accumulate_t<T>>& slab) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = b.shape;
  const Range groups = groups_of(slab, b.counts.group_channels);
  PackedSlab<A> packed{groups.last - groups.first, 0, nullptr};
  packed.length = ceil_div(s.taps() * std::min(b.counts.group_channels, slab.channels()), Tile::kRows) * Tile::kRows;
  const int64_t n = packed.groups * s.group_outputs() * packed.length;
  const Tensor weights = empty_on(weight, {n}, kAccumulateType<A>);
  packed.weights = data<A>(weights);
  stream.launch(deform_conv2d_pack_slab_kernel<A>, {ceil_div(n, kThreads)}, kThreads, 0, s, b.counts,
                any_tensor(weight, "weight"), slab, packed.groups, packed.length, mutable_data<A>(weights));
  const int64_t pixel_tiles = ceil_div(slab.images * s.out_height * s.out_width, Tile::kColumns);
  const auto kernel =
      b.vector ? deform_conv2d_columns_kernel<T, Tile, true> : deform_conv2d_columns_kernel<T, Tile, false>;
  stream.launch(kernel, {packed.length / Tile::kRows * packed.groups * pixel_tiles}, kThreads, 0, b, slab, packed);
}

}  // namespace

template <class T>
void make_columns(const Stream& stream, const Backward<T>& b, const Tensor& weight, Slab<accumulate_t<T>> slab) {
  const int64_t rows = b.shape.taps() * std::min(b.counts.group_channels, slab.channels());
  const Range groups = groups_of(slab, b.counts.group_channels);
  with_tile<accumulate_t<T>>(rows, slab.images * b.shape.out_height * b.shape.out_width, groups.last - groups.first,
                             [&](auto tile) { make_columns_by<decltype(tile)>(stream, b, weight, slab); });
}

#define FASTCV_INSTANTIATE(T) \
  template void make_columns<T>(const Stream&, const Backward<T>&, const Tensor&, Slab<accumulate_t<T>>);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::cuda::deform
