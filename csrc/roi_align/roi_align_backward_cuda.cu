// The gradient of RoIAlign without atomics (roi_tiles_cuda.h): a block of threads owns a tile of 8 x 8 pixels and 64
// channels.
//
// For each region that meets it, the weights of the bins on the tile's rows and columns are made once in shared
// memory; a thread sums its two rows of one channel in registers, up to 16 multiply-adds for each element of the
// gradient that it loads.
//
// Bytes: the gradient once for each tile that a region meets, the map once. Floor for 1000 regions of 256 channels
// and 7 x 7 bins on 200 x 272 pixels in float32, as for the forward pass, 25 us; regions of 14 x 14 pixels meet 4 to
// 9 tiles, so that the gradient's 50 MB are read about 6 times, mostly from the second-level cache.
#include "roi_tiles_cuda.h"

namespace fastcv::cuda {
namespace {

template <class T, class C>
struct Backward {
  RoiRegions<C> regions;
  TiledMaps<T> tiled;
  RoiGroups groups;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
};

// A tile's sums of one region. weights: of PH + PW bins; bounds: the first and last bin with weights, of both axes.
template <class A, class T, class C>
__device__ void add_region(const Backward<T, C>& task, const T* grad, const A* weights, const int (&bounds)[4], int row,
                           A (&sum)[kTileRows][kTile]) {
  const int high = int(task.regions.pooled_height), wide = int(task.regions.pooled_width);
  for (int y = bounds[0]; y <= bounds[1]; ++y) {
    const A* rows = weights + y * kTile + row;
    bool any = false;
    for (int i = 0; i < kTileRows; ++i) any |= rows[i] != 0;
    if (!any) continue;
    for (int x = bounds[2]; x <= bounds[3]; ++x) {
      const A g = load(grad + (y * wide + x) * task.stride_bin);
      const A* columns = weights + (high + x) * kTile;
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        const A weight = rows[i];
        if (weight == 0) continue;  // an infinite gradient must not meet it
#pragma unroll
        for (int j = 0; j < kTile; ++j)
          if (columns[j] != 0) sum[i][j] += g * weight * columns[j];
      }
    }
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<C>)
    roi_align_backward_kernel(const __grid_constant__ Backward<T, C> task) {
  using A = accumulate_t<T>;
  __shared__ int bounds[4];
  const RoiRegions<C>& r = task.regions;
  A* const weights = dynamic_shared<A>();  // [PH + PW][kTile]
  const RoiTile tile = own_tile(task.tiled, r);
  const RoiMapLevel& map = r.level[tile.level];
  const T* grad = task.grad + (tile.channel < r.channels ? tile.channel : 0) * task.stride_c;
  const int t = int(threadIdx.x), high = int(r.pooled_height), bins = high + int(r.pooled_width);
  A sum[kTileRows][kTile] = {};
  each_region_of_tile(task.groups, tile, [&](const int32_t* regions, int n) {
    for (int k = 0; k < n; ++k) {
      if (t == 0) bounds[0] = bounds[2] = INT32_MAX, bounds[1] = bounds[3] = -1;
      __syncthreads();
      const int64_t region = regions[k];
      for (int b = t; b < bins; b += kTileThreads) {
        const bool vertical = b < high;
        const int p = vertical ? b : b - high, axis = vertical ? 0 : 2;
        RoiAxis<C> along = r.rows(region, map);
        if (!vertical) along = r.columns(region, map);
        const int64_t size = vertical ? map.height : map.width, origin = vertical ? tile.y : tile.x;
        if (!tile_weights(along, p, size, origin, weights + b * kTile)) continue;
        atomicMin(&bounds[axis], p);
        atomicMax(&bounds[axis + 1], p);
      }
      __syncthreads();
      add_region(task, grad + region * task.stride_roi, weights, bounds, tile.row, sum);
      __syncthreads();
    }
  });
  if (tile.channel < r.channels)
    write_tile(task.tiled.maps[tile.level], map, tile, [&](int i, int j) { return sum[i][j]; });
}

// ---- shells ---------------------------------------------------------------------------------------------------------

using Levels = std::vector<Tensor>;

template <class T, class C>
void backward(const Tensor& grad, const Tensor& boxes, const std::vector<double>& scales, const RoiConstants& c,
              const Levels& maps) {
  const Stream stream(grad);
  const RoiRegions<C> regions = make_regions<C>(maps, boxes, scales, c);
  const TiledMaps<T> tiled = tile_maps<T>(maps);
  const size_t shared = size_t(c.pooled_height + c.pooled_width) * kTile * sizeof(accumulate_t<T>);
  STD_TORCH_CHECK(shared <= 96 << 10, "output_size: ", c.pooled_height, " x ", c.pooled_width, " bins are too many");
  with_groups(stream, grad, regions, [&](const RoiGroups& groups) {
    const Backward<T, C> task{regions,        tiled,          groups,        data<T>(grad),
                              grad.stride(0), grad.stride(1), grad.stride(3)};
    stream.launch(roi_align_backward_kernel<T, C>,
                  {tiled.first_tile[maps.size()], ceil_div(grad.size(1), kTileChannels)}, kTileThreads, shared, task);
  });
}

struct MapSizes {
  int64_t images, channels;
  std::vector<int64_t> heights, widths;
};

Levels run_backward(const Tensor& grad_any, const Tensor& boxes_any, const std::vector<double>& scales,
                    const RoiConstants& c, const MapSizes& size) {
  check_regions(boxes_any, scales, size.heights.size(), c);
  check_pooled(grad_any, "grad", boxes_any, size.channels, c.pooled_height, c.pooled_width);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = with_one_bin_stride(grad_any);
  Levels maps;
  for (size_t i = 0; i < size.heights.size(); ++i) {
    STD_TORCH_CHECK(size.heights[i] < INT32_MAX && size.widths[i] < INT32_MAX,
                    "heights, widths: expected fewer than 2^31 - 1 pixels");
    maps.push_back(empty_on(grad, {size.images, size.channels, size.heights[i], size.widths[i]}, grad.scalar_type(),
                            format));
  }
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
