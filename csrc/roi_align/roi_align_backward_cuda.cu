// The gradient of RoIAlign without atomics, so that it is the same at every run: each pixel's is made by one thread.
//
// Regions are put in the order of their level and image. A block of threads owns a tile of 8 x 8 pixels of one image and
// 64 channels. It goes through the regions of the image, 256 at a time: those whose extent meets the tile are listed in
// their order, and added one after the other. For a region, the weights of its bins on the tile's rows and columns are
// made once in shared memory; a thread sums two rows of one channel in registers: 16 multiply-adds for each element of
// the gradient that it loads. Each pixel is written once.
//
// Bytes: the gradient once for each tile that a region meets, the map once. Floor for 1000 regions of 256 channels and 7 x 7
// bins on 200 x 272 pixels in float32, as for the forward pass, 25 us; regions of 14 x 14 pixels meet 4 to 9 tiles, so
// that the gradient's 50 MB are read about 6 times, mostly from the second-level cache. Memory: 24 bytes for a region.
#include "roi_align_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kTile = 8, kChannels = 64, kThreads = 256, kRows = kTile * kChannels / kThreads;

// The pixels that a region may touch: rows from top to bottom, with bottom; none where it is below top.
struct Extent {
  int32_t top, bottom, left, right;
};

template <class T, class C>
struct Backward {
  RoiRegions<C> regions;
  T* maps[kMostLevels];  // gradients to be written
  int64_t first_tile[kMostLevels + 1];
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  const int64_t* order;    // [K] regions by group
  const int32_t* group;    // [K] level and image of each region, by region
  const Extent* extents;   // [K] by region
};

template <class C>
__device__ void axis_extent(const RoiAxis<C>& axis, int64_t bins, int64_t size, int32_t* first, int32_t* last) {
  const C end = axis.start + axis.bin * C(bins), low = axis.bin < 0 ? end : axis.start,
          high = axis.bin < 0 ? axis.start : end;
  // A pixel more on each side, for rounding.
  const C least = low - 2 > 0 ? low - 2 : 0, most = high + 2 < C(size - 1) ? high + 2 : C(size - 1);
  *first = 0, *last = -1;
  if (axis.grid > 0 && least <= most) *first = int32_t(least), *last = int32_t(most);
}

template <class C>
__global__ void roi_align_extents_kernel(const __grid_constant__ RoiRegions<C> r, int32_t* group, Extent* extents) {
  const int64_t roi = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (roi >= r.count) return;
  const int level = r.level_of(roi);
  const int64_t image = r.image_of(roi);
  Extent e;
  axis_extent(r.rows(roi, r.level[level]), r.pooled_height, r.level[level].height, &e.top, &e.bottom);
  axis_extent(r.columns(roi, r.level[level]), r.pooled_width, r.level[level].width, &e.left, &e.right);
  extents[roi] = e;
  group[roi] = image < 0 ? int32_t(r.levels * r.images) : int32_t(level * r.images + image);  // the last: no image's
}

// The weight of bin p on each of the tile's pixels along an axis; returns whether there is any.
template <class C, class A>
__device__ bool tile_weights(const RoiAxis<C>& axis, int64_t p, int64_t size, int64_t origin, A* weights) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) weights[i] = 0;
  bool any = false;
  const C inverse = axis.grid > 0 ? 1 / C(axis.grid) : 0;
  int64_t first, last;
  axis.sample_range(p, size, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    int32_t low, high;
    C fraction;
    if (!axis.sample(p, i, size, &low, &high, &fraction)) continue;
    if (const int64_t at = low - origin; at >= 0 && at < kTile) weights[at] += A((1 - fraction) * inverse), any = true;
    if (const int64_t at = high - origin; at >= 0 && at < kTile) weights[at] += A(fraction * inverse), any = true;
  }
  return any;
}

// A tile's sums of one region. weights: of PH + PW bins; bounds: the first and last bin with weights, of both axes.
template <class A, class T, class C>
__device__ void add_region(const Backward<T, C>& task, const T* grad, const A* weights, const int (&bounds)[4], int row,
                           A (&sum)[kRows][kTile]) {
  const int high = int(task.regions.pooled_height), wide = int(task.regions.pooled_width);
  for (int y = bounds[0]; y <= bounds[1]; ++y)
    for (int x = bounds[2]; x <= bounds[3]; ++x) {
      const A g = load(grad + (y * wide + x) * task.stride_bin);
      const A* columns = weights + (high + x) * kTile;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const A weight = weights[y * kTile + row + i * (kTile / kRows)];
        if (weight == 0) continue;  // an infinite gradient must not meet it
#pragma unroll
        for (int j = 0; j < kTile; ++j)
          if (columns[j] != 0) sum[i][j] += g * weight * columns[j];
      }
    }
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 2) roi_align_backward_kernel(const __grid_constant__ Backward<T, C> task) {
  using A = accumulate_t<T>;
  __shared__ int32_t hits[kThreads];
  __shared__ int counts[kThreads / kWarp], bounds[4];
  const RoiRegions<C>& r = task.regions;
  A* const weights = dynamic_shared<A>();  // [PH + PW][kTile]
  const int t = int(threadIdx.x), warp = t / kWarp, lane = t % kWarp;
  int level = 0;
  while (level + 1 < r.levels && int64_t(blockIdx.x) >= task.first_tile[level + 1]) ++level;
  const RoiMapLevel& map = r.level[level];
  const int64_t wide = ceil_div(map.width, kTile), high = ceil_div(map.height, kTile);
  const int64_t tile = int64_t(blockIdx.x) - task.first_tile[level], image = tile / (wide * high);
  const int64_t y0 = tile / wide % high * kTile, x0 = tile % wide * kTile;
  const int64_t channel = int64_t(blockIdx.y) * kChannels + t % kChannels;
  const int row = t / kChannels;  // and those kTile / kRows further on
  const T* grad = task.grad + (channel < r.channels ? channel : 0) * task.stride_c;
  const int32_t wanted = int32_t(level * r.images + image);
  int64_t begin = 0;  // the first region of the group
  for (int64_t end = r.count; begin < end;) {
    const int64_t middle = (begin + end) / 2;
    if (task.group[task.order[middle]] < wanted)
      begin = middle + 1;
    else
      end = middle;
  }
  A sum[kRows][kTile] = {};
  for (int64_t first = begin;; first += kThreads) {
    const int64_t i = first + t;
    const int64_t roi = i < r.count ? task.order[i] : 0;
    const bool mine = i < r.count && task.group[roi] == wanted;
    bool hit = false;
    if (mine) {
      const Extent e = task.extents[roi];
      hit = e.top < y0 + kTile && e.bottom >= y0 && e.left < x0 + kTile && e.right >= x0;
    }
    const uint32_t word = __ballot_sync(kAllLanes, hit);
    if (lane == 0) counts[warp] = __popc(word);
    const bool more = __syncthreads_or(mine);
    int before = __popc(word & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) before += w < warp ? counts[w] : 0, all += counts[w];
    if (hit) hits[before] = int32_t(roi);
    for (int k = 0; k < all; ++k) {
      if (t == 0) bounds[0] = bounds[2] = INT32_MAX, bounds[1] = bounds[3] = -1;
      __syncthreads();
      const int64_t region = hits[k];
      for (int b = t; b < r.pooled_height + r.pooled_width; b += kThreads) {
        const bool vertical = b < r.pooled_height;
        const int p = vertical ? b : b - int(r.pooled_height), axis = vertical ? 0 : 2;
        RoiAxis<C> along = r.rows(region, map);
        if (!vertical) along = r.columns(region, map);
        if (!tile_weights(along, p, vertical ? map.height : map.width, vertical ? y0 : x0, weights + b * kTile)) continue;
        atomicMin(&bounds[axis], p);
        atomicMax(&bounds[axis + 1], p);
      }
      __syncthreads();
      add_region(task, grad + region * task.stride_roi, weights, bounds, row, sum);
      __syncthreads();
    }
    __syncthreads();
    if (!more) break;
  }
  if (channel >= r.channels) return;
  T* const to = task.maps[level] + image * map.stride_n + channel * map.stride_c;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int64_t y = y0 + row + i * (kTile / kRows), x = x0 + j;
      if (y < map.height && x < map.width) store(to + y * map.stride_y + x * map.stride_x, sum[i][j]);
    }
}

// ---- shells ---------------------------------------------------------------------------------------------------------

using Levels = std::vector<Tensor>;

template <class T, class C>
void backward(const Tensor& grad, const Tensor& boxes, const std::vector<double>& scales, const RoiConstants& c,
              const Levels& maps) {
  const Stream stream(grad);
  const int64_t count = boxes.size(0);
  Tensor group = empty_on(grad, {count}, ScalarType::Int), extents = empty_on(grad, {count, 4}, ScalarType::Int);
  Backward<T, C> task{make_regions<C>(maps, boxes, scales, c), {}, {}, data<T>(grad), grad.stride(0), grad.stride(1),
                      grad.stride(3)};
  stream.launch(roi_align_extents_kernel<C>, {ceil_div(count, kThreads)}, kThreads, 0, task.regions,
                mutable_data<int32_t>(group), reinterpret_cast<Extent*>(mutable_data<int32_t>(extents)));
  const Tensor order = stable_argsort(group, false);
  task.order = data<int64_t>(order), task.group = data<int32_t>(group);
  task.extents = reinterpret_cast<const Extent*>(data<int32_t>(extents));
  for (size_t i = 0; i < maps.size(); ++i) {
    task.maps[i] = mutable_data<T>(maps[i]);
    task.first_tile[i + 1] = task.first_tile[i] +
                             maps[i].size(0) * ceil_div(maps[i].size(2), kTile) * ceil_div(maps[i].size(3), kTile);
  }
  const size_t shared = size_t(c.pooled_height + c.pooled_width) * kTile * sizeof(accumulate_t<T>);
  STD_TORCH_CHECK(shared <= 96 << 10, "output_size: ", c.pooled_height, " x ", c.pooled_width, " bins are too many");
  stream.launch(roi_align_backward_kernel<T, C>, {task.first_tile[maps.size()], ceil_div(grad.size(1), kChannels)},
                kThreads, shared, task);
}

struct MapSizes {
  int64_t images, channels;
  std::vector<int64_t> heights, widths;
};

Levels run_backward(const Tensor& grad_any, const Tensor& boxes_any, const std::vector<double>& scales,
                    const RoiConstants& c, const MapSizes& size) {
  check_regions(boxes_any, scales, size.heights.size(), c);
  STD_TORCH_CHECK(grad_any.dim() == 4 && grad_any.size(0) == boxes_any.size(0) && grad_any.size(1) == size.channels &&
                      grad_any.size(2) == c.pooled_height && grad_any.size(3) == c.pooled_width,
                  "grad: expected shape [", boxes_any.size(0), ", ", size.channels, ", ", c.pooled_height, ", ",
                  c.pooled_width, "]");
  const MemoryFormat format = memory_format(grad_any);
  // The kernel walks over bins with one stride.
  const Tensor grad =
      grad_any.stride(2) == grad_any.stride(3) * c.pooled_width ? grad_any : torch::stable::contiguous(grad_any);
  Levels maps;
  for (size_t i = 0; i < size.heights.size(); ++i)
    maps.push_back(empty_on(grad, {size.images, size.channels, size.heights[i], size.widths[i]}, grad.scalar_type(),
                            format));
  dispatch_regions(grad.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    backward<decltype(feature), C>(grad, boxes, scales, c, maps);
  });
  return maps;
}

Tensor roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                               int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                               int64_t width, int64_t sampling_ratio, bool aligned) {
  return run_backward(grad, boxes, {spatial_scale}, {pooled_height, pooled_width, sampling_ratio, aligned},
                      {batch_size, channels, {height}, {width}})[0];
}

Levels multiscale_roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes,
                                          const std::vector<double>& spatial_scales, int64_t pooled_height,
                                          int64_t pooled_width, int64_t batch_size, int64_t channels,
                                          const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                                          int64_t sampling_ratio, bool aligned, int64_t canonical_scale,
                                          int64_t canonical_level) {
  STD_TORCH_CHECK(heights.size() == widths.size(), "heights, widths: expected as many of both");
  return run_backward(grad, boxes, spatial_scales,
                      {pooled_height, pooled_width, sampling_ratio, aligned, canonical_scale, canonical_level},
                      {batch_size, channels, heights, widths});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("roi_align_backward", TORCH_BOX(&fastcv::cuda::roi_align_backward_cuda));
  m.impl("multiscale_roi_align_backward", TORCH_BOX(&fastcv::cuda::multiscale_roi_align_backward_cuda));
}
