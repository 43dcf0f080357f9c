// The gradient of regions pooled by their taps, without atomics (roi_tiles_cuda.h): a block of threads owns a tile of
// 8 x 8 pixels and 64 channels. R says which taps those are.
//
// For each region that meets it, the weights of the bins on the tile's rows and columns are made once in shared
// memory; a thread sums its two rows of one channel in registers, up to 16 multiply-adds for each element of the
// gradient that it loads.
#pragma once

#include "roi_tiles_cuda.h"

namespace fastcv::cuda {

template <class T, class R>
struct RoiBackward {
  R regions;
  TiledMaps<T> tiled;
  RoiGroups groups;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
};

// A tile's sums of one region. weights: of PH + PW bins; bounds: the first and last bin with weights, of both axes.
template <class A, class T, class R>
__device__ void add_region(const RoiBackward<T, R>& task, const T* grad, const A* weights, const int (&bounds)[4],
                           int row, A (&sum)[kTileRows][kTile]) {
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

template <class T, class R>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<typename R::Coordinate>)
    roi_backward_kernel(const __grid_constant__ RoiBackward<T, R> task) {
  using A = accumulate_t<T>;
  __shared__ int bounds[4];
  const R& r = task.regions;
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
        typename R::Axis along = r.rows(region, map);
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

// ---- on the host ----------------------------------------------------------------------------------------------------

// grad: bins lie one stride apart.
template <class T, class R>
void pool_regions_backward(const Tensor& grad, const R& regions, const std::vector<Tensor>& maps) {
  const Stream stream(grad);
  const TiledMaps<T> tiled = tile_maps<T>(maps);
  const size_t shared = size_t(regions.pooled_height + regions.pooled_width) * kTile * sizeof(accumulate_t<T>);
  STD_TORCH_CHECK(shared <= 96 << 10, "output_size: ", regions.pooled_height, " x ", regions.pooled_width,
                  " bins are too many");
  with_groups(stream, grad, regions, [&](const RoiGroups& groups) {
    const RoiBackward<T, R> task{regions,        tiled,          groups,        data<T>(grad),
                                 grad.stride(0), grad.stride(1), grad.stride(3)};
    stream.launch(roi_backward_kernel<T, R>, {tiled.first_tile[maps.size()], ceil_div(grad.size(1), kTileChannels)},
                  kTileThreads, shared, task);
  });
}

}  // namespace fastcv::cuda
