// The gradient of RoI pooling without atomics (../roi_align/roi_tiles_cuda.h): a block of threads owns a tile of 8 x 8
// pixels and 64 channels.
//
// Each bin's gradient goes to the pixel of its maximum, so a thread looks at the positions of those bins that meet
// its two rows of the tile, and adds the gradients of those that lie in them: to its own sums, which are in shared
// memory, as the position says which. Which bins meet the rows is found for 16 regions at once, by a thread for each
// bin of an axis.
//
// Bytes: a position for each pair of rows and tile that its bin meets, the gradients of those that lie there, and the
// map once. Floor for 1000 regions of 256 channels, 7 x 7 bins, on 200 x 272 pixels in float32: gradients and
// positions 100 MB, the map 56 MB, 36 us at 4.3 TB/s. A bin of 2 x 2 pixels and the one it shares meets 2 pairs of
// rows and 1 to 2 tiles, so that its position is read about 3 times, mostly from the first-level cache.
#include "../roi_align/roi_tiles_cuda.h"
#include "roi_pool_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kAtOnce = 16;  // regions
constexpr int kPairs = kTile / kTileRows;

template <class T, class C>
struct Backward {
  PoolRegions<C> regions;
  TiledMaps<T> tiled;
  RoiGroups groups;
  const T* grad;  // [K, C, PH, PW]
  int64_t grad_stride_roi, grad_stride_c, grad_stride_bin;
  const int32_t* argmax;
  int64_t argmax_stride_roi, argmax_stride_c, argmax_stride_bin;
};

// Of one axis those from first to last; bins are in the order of their pixels.
struct Bins {
  int first, last;

  __device__ void add(int p) {
    atomicMin(&first, p);
    atomicMax(&last, p);
  }
};

// The bins of one region that a tile meets: for each thread's rows, and for all its columns.
struct TileBins {
  Bins rows[kPairs], columns;
};

template <class R>
__device__ void find_bins(const R& r, const RoiTile& tile, const int32_t* regions, int n, TileBins* found) {
  const RoiMapLevel& map = r.level[0];
  const int high = int(r.pooled_height), axis_bins = high + int(r.pooled_width), t = int(threadIdx.x);
  for (int i = t; i < n * (kPairs + 1); i += kTileThreads) reinterpret_cast<Bins*>(found)[i] = {INT32_MAX, -1};
  __syncthreads();
  for (int i = t; i < n * axis_bins; i += kTileThreads) {
    const int k = i / axis_bins, b = i - k * axis_bins;
    if (b < high) {
      const PixelRange y = r.rows(regions[k], map).range(b, map.height);
      for (int pair = 0; pair < kPairs; ++pair)
        if (const int32_t top = tile.y + pair * kTileRows; y.begin - kTileRows < top && y.end > top)
          found[k].rows[pair].add(b);
    } else {
      const PixelRange x = r.columns(regions[k], map).range(b - high, map.width);
      if (x.begin - kTile < tile.x && x.end > tile.x) found[k].columns.add(b - high);
    }
  }
  __syncthreads();
}

template <class T, class C>
__global__ void __launch_bounds__(kTileThreads, 4)
    roi_pool_backward_kernel(const __grid_constant__ Backward<T, C> task) {
  using A = accumulate_t<T>;
  static_assert(kTileRows == 2);
  __shared__ TileBins found[kAtOnce];
  const PoolRegions<C>& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  const RoiTile tile = own_tile(task.tiled, r);
  A* const sums = dynamic_shared<A>() + threadIdx.x;  // [kTileRows][kTile], kTileThreads apart
  for (int i = 0; i < kTileRows * kTile; ++i) sums[i * kTileThreads] = 0;
  const bool here = tile.channel < r.channels;
  const T* const grad = task.grad + (here ? tile.channel : 0) * task.grad_stride_c;
  const int32_t* const argmax = task.argmax + (here ? tile.channel : 0) * task.argmax_stride_c;
  // The positions of the thread's first row begin at `origin`; -1, which is no position, is far from all.
  const uint32_t width = uint32_t(map.width), origin = uint32_t(tile.y + tile.row) * width + uint32_t(tile.x);
  const uint32_t columns = uint32_t(map.width - tile.x < kTile ? map.width - tile.x : kTile);
  const int wide = int(r.pooled_width);

  each_region_of_tile(task.groups, tile, [&](const int32_t* regions, int n) {
    for (int from = 0; from < n; from += kAtOnce) {
      const int some = n - from < kAtOnce ? n - from : kAtOnce;
      find_bins(r, tile, regions + from, some, found);
      for (int k = 0; here && k < some; ++k) {
        const T* const g = grad + regions[from + k] * task.grad_stride_roi;
        const int32_t* const positions = argmax + regions[from + k] * task.argmax_stride_roi;
        const Bins ys = found[k].rows[tile.row / kTileRows], xs = found[k].columns;
        for (int y = ys.first; y <= ys.last; ++y)
#pragma unroll 4
          for (int x = xs.first; x <= xs.last; ++x) {
            const int bin = y * wide + x;
            const uint32_t at = uint32_t(positions[bin * task.argmax_stride_bin]) - origin, below = at - width;
            const uint32_t place = at < columns ? at : below < columns ? kTile + below : kTileRows * kTile;
            if (place < kTileRows * kTile) sums[place * kTileThreads] += load(g + bin * task.grad_stride_bin);
          }
      }
      __syncthreads();
    }
  });
  if (here)
    write_tile(task.tiled.maps[0], map, tile, [&](int i, int j) { return sums[(i * kTile + j) * kTileThreads]; });
}

// ---- shell ----------------------------------------------------------------------------------------------------------

Tensor roi_pool_backward_cuda(const Tensor& grad_any, const Tensor& boxes, const Tensor& argmax_any,
                              double spatial_scale, int64_t pooled_height, int64_t pooled_width, int64_t batch_size,
                              int64_t channels, int64_t height, int64_t width) {
  const RoiConstants c{pooled_height, pooled_width, 0, false};
  check_pool(boxes, c, spatial_scale, height, width);
  check_pooled(grad_any, "grad", boxes, channels, pooled_height, pooled_width);
  check_pooled(argmax_any, "argmax", boxes, channels, pooled_height, pooled_width);
  STD_TORCH_CHECK(argmax_any.scalar_type() == ScalarType::Int, "argmax: expected int32");
  const Tensor grad = with_one_bin_stride(grad_any), argmax = with_one_bin_stride(argmax_any);
  const Tensor map =
      empty_on(grad, {batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  const Stream stream(grad);
  dispatch_pool_regions(map, boxes, spatial_scale, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using C = typename std::decay_t<decltype(regions)>::Coordinate;
    const TiledMaps<T> tiled = tile_maps<T>({map});
    with_groups(stream, grad, regions, [&](const RoiGroups& groups) {
      const Backward<T, C> task{regions,          tiled,            groups,
                                data<T>(grad),    grad.stride(0),   grad.stride(1),   grad.stride(3),
                                data<int32_t>(argmax), argmax.stride(0), argmax.stride(1), argmax.stride(3)};
      stream.launch(roi_pool_backward_kernel<T, C>, {tiled.first_tile[1], ceil_div(channels, kTileChannels)},
                    kTileThreads, kTileRows * kTile * kTileThreads * sizeof(accumulate_t<T>), task);
    });
  });
  return map;
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("roi_pool_backward", TORCH_BOX(&fastcv::cuda::roi_pool_backward_cuda)); }
