// The backward pass of deformable convolution, without atomics on floats, so that gradients are the same at every run.
//
//     points    where each kernel element samples at each pixel, once for all that follows: 20 bytes in float32
//     columns   the gradient of the samples: transposed weights times the output's gradient, a matrix product by tiles
//     offset    a thread, or eight where channels lie side by side, for each point: sums over its channels
//     input     points are sorted by the cell that they are in, the pixel to their upper left: a pixel's gradient is
//               the sum over the points of the four cells around it, in their order; a warp goes through them for 32
//               channels
//
// Columns are made for a slab of channels at a time, and of images where those of a batch are many, and used while they
// are in the second-level cache. Gradients of weight and bias have a file of their own, as they need none of this.
//
// Operations: as many multiply-adds as the forward pass for the columns, 20 for each sample, of which there are
// channels x kernel elements x pixels. Floor for 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3x3,
// in float32: 32 GFLOP, 0.53 ms at 60 TFLOP/s; 250 MB of columns are written once and read by two kernels, 0.17 ms
// at 4.3 TB/s were they read from memory. With the weight's gradient, 1.07 ms. Memory beyond the gradients: points; a
// slab, 32 MB or the columns of 32 channels of an image; for the input's gradient about 40 bytes for each point while
// they are sorted, of which 8 stay, and 8 for each pixel and offset group.
#include "deform_conv2d_backward_cuda.h"

namespace fastcv::cuda::deform {
namespace {

// ---- points ---------------------------------------------------------------------------------------------------------

// cells: null, or for each point the number of its upper left pixel among those of all images and offset groups, with a
// row and a column before the first; the number of all cells where the point is read nowhere.
template <class A, class Cell>
__global__ void deform_conv2d_points_kernel(const __grid_constant__ DeformConv2dShape s,
                                            const __grid_constant__ AnyTensor offset,
                                            const __grid_constant__ AnyTensor mask, Point<A>* points, Cell* cells) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, in_image = s.out_height * s.out_width;
  const int64_t channels = s.offset_groups * s.taps(), pixel = i % in_image, image = i / in_image / channels;
  if (image >= s.batch) return;
  const int64_t channel = i / in_image % channels, y = pixel / s.out_width, x = pixel % s.out_width;
  const int64_t at =
      image * offset.stride[0] + 2 * channel * offset.stride[1] + y * offset.stride[2] + x * offset.stride[3];
  A m = 1;
  if (mask.data)
    m = load_element<A>(mask,
                        image * mask.stride[0] + channel * mask.stride[1] + y * mask.stride[2] + x * mask.stride[3]);
  const Point<A> p = locate(s, int(y), int(x), int(channel % s.taps()), load_element<A>(offset, at),
                            load_element<A>(offset, at + offset.stride[1]), m);
  points[i] = p;
  if (!cells) return;
  const bool read = p.y >= -1 && p.y < s.height && p.x >= -1 && p.x < s.width;
  const int64_t group = image * s.offset_groups + channel / s.taps();
  const int64_t cell = (group * (s.height + 1) + p.y + 1) * (s.width + 1) + p.x + 1;
  cells[i] = Cell(read ? cell : s.batch * s.offset_groups * (s.height + 1) * (s.width + 1));
}

// starts[i]: how many points have a smaller cell than i < n.
template <class Cell>
__global__ void deform_conv2d_cell_starts_kernel(const Cell* cells, const int64_t* order, int64_t points,
                                                 int64_t* starts, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  int64_t low = 0, high = points;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cells[order[middle]] < i)
      low = middle + 1;
    else
      high = middle;
  }
  starts[i] = low;
}

// ---- offset and mask ------------------------------------------------------------------------------------------------

// Sums over channels: gradients with respect to a point's y, x and mask.
template <class A>
struct Slopes {
  A y, x, mask;
};

template <class T, class A>
__device__ void add_slopes(const Corners<T>& corners, const Point<A>& p, const Four<A>& grad, Slopes<A>& sum) {
  const A below = p.fy, above = 1 - below, right = p.fx, left = 1 - right;
  const bool edge = on_edge(p);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto read = [&](T raw) {  // at the edge, weighed by zero: infinity must not make NaN of it
      const A x = to_accumulate(raw);
      return edge && x - x != 0 ? A(0) : x;
    };
    const A a = read(corners.upper_left.x[j]), b = read(corners.upper_right.x[j]);
    const A c = read(corners.lower_left.x[j]), d = read(corners.lower_right.x[j]), g = grad.x[j];
    sum.y += g * (left * c + right * d - left * a - right * b);
    sum.x += g * (above * b + below * d - above * a - below * c);
    sum.mask += g * (above * left * a + above * right * b + below * left * c + below * right * d);
  }
}

// kVector: eight lanes share a point. Added to grad_offset and grad_mask, either of which may be null.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    deform_conv2d_offset_gradient_kernel(const __grid_constant__ Backward<T> b,
                                         const __grid_constant__ Slab<accumulate_t<T>> slab, Range groups,
                                         accumulate_t<T>* grad_offset, accumulate_t<T>* grad_mask) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kVector ? 8 : 1;
  const DeformConv2dShape& s = b.shape;
  const int64_t in_image = s.out_height * s.out_width, in_group = b.counts.taps * in_image;
  const int64_t i = (blockIdx.x * int64_t(kThreads) + threadIdx.x) / kLanes, of_slab = i / in_group;
  const int lane = int(threadIdx.x) % kLanes, count = groups.last - groups.first;
  const int group = groups.first + int(of_slab % count);
  const int64_t image = of_slab / count, in_slab = i % in_group;
  const bool exists = image < slab.images;  // if not, it takes part in the shuffles
  const int64_t point = ((slab.first_image + image) * s.offset_groups + group) * in_group + in_slab;
  Point<A> p{};
  if (exists) p = b.points[point];
  const Range channels = intersect(slab, group, b.counts.offset_group_channels);
  const A* columns = slab.columns + (image * in_group + in_slab) * slab.channels() - slab.first;
  const Site<T> at = site_of(s, b.input, b.input.data + (slab.first_image + image) * b.input.stride[0], p);
  const bool fours = kVector || ((channels.last - channels.first) % 4 == 0 && slab.channels() % 4 == 0 &&
                                 (channels.first - slab.first) % 4 == 0);
  Slopes<A> sum{};
  for (int c = channels.first + 4 * lane; exists && c < channels.last; c += 4 * kLanes) {
    const int n = channels.last - c;
    const Corners<T> corners = load_corners<kVector>(b.input, at, c, n);
    add_slopes(corners, p, fours ? load_four<true>(columns + c, 1, n) : load_four<false>(columns + c, 1, n), sum);
  }
#pragma unroll
  for (int k = 1; k < kLanes; k *= 2) {
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, k);
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, k);
    sum.mask += __shfl_xor_sync(kAllLanes, sum.mask, k);
  }
  if (!exists || lane > 0) return;
  const int64_t y_at = 2 * point - in_slab % in_image;  // y of all pixels comes before x
  if (grad_offset) grad_offset[y_at] += sum.y * p.mask, grad_offset[y_at + in_image] += sum.x * p.mask;
  if (grad_mask) grad_mask[point] += sum.mask;
}

// ---- input ----------------------------------------------------------------------------------------------------------

template <class T>
struct InputGradient {
  T* data;
  int64_t stride[3];      // of images, channels and pixels
  const int64_t* order;   // points by cell
  const int64_t* starts;  // of each cell in the order, and the end
};

// The gradient of a pixel and channel. columns: of the channel, by point. All lanes of a warp have the same pixel.
template <class T, class A>
__device__ A gather(const Backward<T>& b, const InputGradient<T>& grad, int64_t group, int y, int x, const A* columns,
                    int64_t channels, bool exists) {
  const DeformConv2dShape& s = b.shape;
  const int lane = int(threadIdx.x) % kWarp;
  A sum = 0;
  for (int row = 0; row < 2; ++row) {  // cells above left and above, then left and its own
    const int64_t cell = (group * (s.height + 1) + y + row) * (s.width + 1) + x;
    const int64_t end = grad.starts[cell + 2];
    for (int64_t k = grad.starts[cell]; k < end; k += kWarp) {
      int64_t at = 0;
      A weight = 0;
      if (k + lane < end) {
        const int64_t point = grad.order[k + lane];
        const Point<A> p = b.points[point];
        at = point * channels;
        weight = (row ? 1 - p.fy : p.fy) * (p.x == x ? 1 - p.fx : p.fx) * p.mask;
      }
      const int n = end - k < kWarp ? int(end - k) : kWarp;
#pragma unroll 4
      for (int j = 0; j < n; ++j) {
        const A w = __shfl_sync(kAllLanes, weight, j);
        const int64_t from = __shfl_sync(kAllLanes, at, j);
        if (exists) sum += w * columns[from];
      }
    }
  }
  return sum;
}

// A block makes 32 pixels of 32 channels of an offset group. Blocks: tiles of pixels, tiles of channels, offset groups,
// images; the first vary fastest. Four blocks on a multiprocessor: by itself nvcc spills three registers on sm_80.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    deform_conv2d_input_gradient_kernel(const __grid_constant__ Backward<T> b,
                                        const __grid_constant__ Slab<accumulate_t<T>> slab, Range groups,
                                        int channel_tiles, const __grid_constant__ InputGradient<T> grad) {
  using A = accumulate_t<T>;
  __shared__ A tile[kWarp][kWarp + 1];
  const DeformConv2dShape& s = b.shape;
  const int64_t in_image = s.height * s.width, tiles = ceil_div(in_image, kWarp), block = blockIdx.x / tiles;
  const int64_t first_pixel = blockIdx.x % tiles * kWarp, of_slab = block / channel_tiles;
  const int count = groups.last - groups.first, group = groups.first + int(of_slab % count);
  const int64_t image = of_slab / count, of_batch = slab.first_image + image,
                offset_group = of_batch * s.offset_groups + group;
  const Range channels = intersect(slab, group, b.counts.offset_group_channels);
  const int first = channels.first + int(block % channel_tiles) * kWarp;
  if (first >= channels.last) return;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  // A point's columns lie in the slab where they would if that had all images and offset groups, but for this.
  const int64_t shift = (offset_group - image) * b.counts.taps * s.out_height * s.out_width;
  const A* columns = slab.columns - shift * slab.channels() + first - slab.first + lane;
  int y = int(first_pixel / s.width), x = int(first_pixel % s.width) + warp;
  for (int i = warp; i < kWarp && first_pixel + i < in_image; i += kThreads / kWarp, x += kThreads / kWarp) {
    for (; x >= int(s.width); x -= int(s.width)) ++y;
    tile[lane][i] = gather(b, grad, offset_group, y, x, columns, slab.channels(), first + lane < channels.last);
  }
  __syncthreads();
  for (int i = warp; i < kWarp; i += kThreads / kWarp) {  // lanes over what lies side by side
    const int channel = grad.stride[1] == 1 ? lane : i, pixel = grad.stride[1] == 1 ? i : lane;
    if (first + channel < channels.last && first_pixel + pixel < in_image)
      store(grad.data + of_batch * grad.stride[0] + (first + channel) * grad.stride[1] +
                (first_pixel + pixel) * grad.stride[2],
            tile[channel][pixel]);
  }
}

// ---- shell ----------------------------------------------------------------------------------------------------------

Tensor as_type(const Tensor& x, ScalarType dtype) { return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype); }

// Points by the cell that they are in.
struct Cells {
  Tensor order, starts;
};

template <class Cell, class A>
Cells find_points(const Stream& stream, const DeformConv2dShape& s, const Tensor& offset, const Tensor* mask,
                  const Tensor& points, bool sorted) {
  const int64_t n = s.pixels() * s.offset_groups * s.taps();
  const int64_t all = s.batch * s.offset_groups * (s.height + 1) * (s.width + 1) + 1;
  const Tensor cells = empty_on(offset, {sorted ? n : 0}, sizeof(Cell) == 8 ? ScalarType::Long : ScalarType::Int);
  stream.launch(deform_conv2d_points_kernel<A, Cell>, {ceil_div(n, kThreads)}, kThreads, 0, s,
                any_tensor(offset, "offset"), mask ? any_tensor(*mask, "mask") : AnyTensor{},
                reinterpret_cast<Point<A>*>(mutable_data<uint8_t>(points)),
                sorted ? mutable_data<Cell>(cells) : nullptr);
  if (!sorted) return {cells, cells};
  Cells found{stable_argsort(cells, false), empty_on(offset, {all}, ScalarType::Long)};
  stream.launch(deform_conv2d_cell_starts_kernel<Cell>, {ceil_div(all, kThreads)}, kThreads, 0, data<Cell>(cells),
                data<int64_t>(found.order), n, mutable_data<int64_t>(found.starts), all);
  return found;
}

// Channels and images of a slab.
template <class A>
std::pair<int64_t, int64_t> slab_size(const DeformConv2dShape& s) {
  constexpr int64_t kLeast = 32;
  const int64_t of_channel = s.taps() * s.out_height * s.out_width * int64_t(sizeof(A));
  const int64_t fit = kSlabBytes / (of_channel * s.batch) / kLeast * kLeast;
  const int64_t channels = std::min(std::max(fit, kLeast), s.channels);
  return {channels, std::clamp<int64_t>(kSlabBytes / (of_channel * channels), 1, s.batch)};
}

template <class T>
struct Outputs {
  InputGradient<T> input;  // data is null where it is not wanted; so are these
  accumulate_t<T>*offset, *mask;
};

template <class T>
void use_columns(const Stream& stream, const Backward<T>& b, const Slab<accumulate_t<T>>& slab,
                 const Outputs<T>& outputs) {
  const DeformConv2dShape& s = b.shape;
  const Range groups = groups_of(slab, b.counts.offset_group_channels);
  const int64_t count = slab.images * (groups.last - groups.first);
  if (outputs.offset || outputs.mask) {
    const int64_t threads = count * s.taps() * s.out_height * s.out_width * (b.vector ? 8 : 1);
    const auto kernel =
        b.vector ? deform_conv2d_offset_gradient_kernel<T, true> : deform_conv2d_offset_gradient_kernel<T, false>;
    stream.launch(kernel, {ceil_div(threads, kThreads)}, kThreads, 0, b, slab, groups, outputs.offset, outputs.mask);
  }
  if (outputs.input.data) {
    const int64_t tiles = ceil_div(std::min(b.counts.offset_group_channels, slab.channels()), kWarp);
    stream.launch(deform_conv2d_input_gradient_kernel<T>, {ceil_div(s.height * s.width, kWarp) * tiles * count},
                  kThreads, 0, b, slab, groups, int(tiles), outputs.input);
  }
}

template <class T>
void run_slabs(const Stream& stream, const Backward<T>& b, const Tensor& weight, const Outputs<T>& outputs) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = b.shape;
  const auto [channels, images] = slab_size<A>(s);
  const Tensor columns =
      empty_on(weight, {channels * images * s.taps() * s.out_height * s.out_width}, kAccumulateType<A>);
  for (int64_t c = 0; c < s.channels; c += channels)
    for (int64_t n = 0; n < s.batch; n += images) {
      const Slab<A> slab{n, std::min(images, s.batch - n), int(c), int(std::min(c + channels, s.channels)),
                         mutable_data<A>(columns)};
      make_columns(stream, b, weight, slab);
      use_columns(stream, b, slab, outputs);
    }
}

// All but the gradient of the bias. results: in the type of sums, but that of the input.
template <class T>
void fill_gradients(const Stream& stream, Backward<T>& b, const Tensor& weight, const Tensor& offset,
                    const Tensor* mask, int64_t needs, Tensor (&results)[5]) {
  using A = accumulate_t<T>;
  const DeformConv2dShape& s = b.shape;
  const Tensor points =
      empty_on(weight, {s.pixels() * s.offset_groups * s.taps() * int64_t(sizeof(Point<A>))}, ScalarType::Byte);
  b.points = reinterpret_cast<const Point<A>*>(data<uint8_t>(points));
  const bool few = s.batch * s.offset_groups * (s.height + 1) * (s.width + 1) < std::numeric_limits<int32_t>::max();
  const Cells cells =
      (few ? find_points<int32_t, A> : find_points<int64_t, A>)(stream, s, offset, mask, points, needs & kInput);
  if (needs & kWeight) results[1] = weight_gradient(stream, b, weight);
  if (!(needs & (kInput | kOffset | kMask))) return;
  Outputs<T> outputs{};
  if (needs & kOffset) outputs.offset = mutable_data<A>(results[2]);
  if (needs & kMask) outputs.mask = mutable_data<A>(results[3]);
  if (needs & kInput) {
    const Tensor& x = results[0];
    const bool last = is_channels_last(x);
    outputs.input = {mutable_data<T>(x),
                     {s.channels * s.height * s.width, last ? 1 : s.height * s.width, last ? s.channels : 1},
                     data<int64_t>(cells.order),
                     data<int64_t>(cells.starts)};
  }
  run_slabs(stream, b, weight, outputs);
}

// dtype: of T.
template <class T>
FiveTensors backward(const DeformConv2dShape& s, ScalarType dtype, const Tensor& grad_any, const Tensor& input_any,
                     const Tensor& weight, const Tensor& offset, const Tensor& mask, const Tensor& bias, bool use_mask,
                     int64_t needs) {
  using A = accumulate_t<T>;
  const Stream stream(input_any);
  if (!use_mask) needs &= ~kMask;
  const Tensor* const originals[5] = {&input_any, &weight, &offset, &mask, &bias};
  Tensor results[5];
  for (int i = 0; i < 5; ++i) {
    const Tensor& x = *originals[i];
    std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
    if (!(needs >> i & 1)) size = {0};
    results[i] = i == 0 && needs & kInput ? empty_on(x, size, dtype, memory_format(x))
                                          : torch::stable::new_zeros(x, size, kAccumulateType<A>);
  }
  if (grad_any.numel() > 0) {
    const Tensor grad = as_type(grad_any, dtype), input = as_type(input_any, dtype);
    Backward<T> b{s, Counts(s), any_map<T>(grad), any_map<T>(input), nullptr, false};
    b.vector = lies_in_fours(b.input, s.group_channels()) && s.offset_group_channels() % 4 == 0 &&
               lies_in_fours(b.grad, s.group_outputs());
    if (needs & ~kBias) fill_gradients(stream, b, weight, offset, use_mask ? &mask : nullptr, needs, results);
    if (needs & kBias && bias.numel() > 0) results[4] = bias_gradient(stream, b, grad);
  } else if (needs & kInput) {
    torch::stable::zero_(results[0]);
  }
  for (int i = 0; i < 5; ++i) results[i] = as_type(results[i], originals[i]->scalar_type());
  return {results[0], results[1], results[2], results[3], results[4]};
}

FiveTensors deform_conv2d_backward_cuda(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                        const Tensor& offset, const Tensor& mask, const Tensor& bias, int64_t stride_h,
                                        int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                                        int64_t dilation_w, int64_t groups, int64_t offset_groups, bool use_mask,
                                        int64_t needs) {
  const Geometry geometry{stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups};
  const DeformConv2dShape s = check_shape(input, weight, offset, use_mask ? &mask : nullptr, bias, geometry);
  check_device(grad, "grad", input);
  check_size(grad, "grad", s.batch, s.out_channels, s.out_height, s.out_width);
  float_type(input, "input"), float_type(grad, "grad");
  // A gradient of another type than the input: both as the type of sums.
  ScalarType dtype = input.scalar_type();
  if (grad.scalar_type() != dtype) dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<FiveTensors> gradients;
  dispatch_floating(dtype, "input", [&](auto type) {
    gradients = backward<decltype(type)>(s, dtype, grad, input, weight, offset, mask, bias, use_mask, needs);
  });
  return *gradients;
}

}  // namespace
}  // namespace fastcv::cuda::deform

FASTCV_CUDA_LIBRARY(m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&fastcv::cuda::deform::deform_conv2d_backward_cuda));
}
