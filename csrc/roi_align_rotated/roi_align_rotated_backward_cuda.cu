// The gradient of rotated RoIAlign without atomics (../roi_align/roi_tiles_cuda.h): a block of threads owns a tile of
// 8 x 8 pixels and 64 channels.
//
// For each region that meets it, threads look at a sample each; those that touch the tile are listed in their order,
// and every thread adds what they have for its two rows of one channel.
//
// Bytes: the gradient once for each tile that a region meets, the map once. Floor for 1000 regions of 256 channels and
// 7 x 7 bins on 200 x 272 pixels in float32, as for the forward pass, 25 us; 196 samples of a region are looked at by
// each of 4 to 9 tiles and 4 blocks of channels.
#include "roi_align_rotated_cuda.h"

namespace fastcv::cuda {
namespace {

template <class T, class R>
struct Backward {
  R regions;
  TiledMaps<T> tiled;
  RoiGroups groups;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
};

template <class A>
struct Hit {
  int bin;
  BilinearTap<A> tap;
};

// One sample for a thread's rows of the tile, of which `g` is the gradient.
template <class A>
__device__ void add_sample(const BilinearTap<A>& tap, const RoiTile& tile, A g, A (&sum)[kTileRows][kTile]) {
  const int y = tap.y - tile.y - tile.row, x = tap.x - tile.x;
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    const A left = y == i ? tap.weight[0] : y + 1 == i ? tap.weight[2] : 0;
    const A right = y == i ? tap.weight[1] : y + 1 == i ? tap.weight[3] : 0;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const A weight = x == j ? left : x + 1 == j ? right : 0;
      if (weight != 0) sum[i][j] += g * weight;  // an infinite gradient must not meet 0
    }
  }
}

template <class T, class R>
__global__ void __launch_bounds__(kTileThreads, sizeof(typename R::Coordinate) == 8 ? 1 : 2)
    roi_align_rotated_backward_kernel(const __grid_constant__ Backward<T, R> task) {
  using A = accumulate_t<T>;
  __shared__ Hit<A> hits[kTileThreads];
  __shared__ int counts[kTileThreads / kWarp];
  const R& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  const RoiTile tile = own_tile(task.tiled, r);
  const bool here = tile.channel < r.channels;
  const T* const grad = task.grad + (here ? tile.channel : 0) * task.stride_c;
  const int t = int(threadIdx.x), wide = int(r.pooled_width);
  A sum[kTileRows][kTile] = {};
  each_region_of_tile(task.groups, tile, [&](const int32_t* regions, int n) {
    for (int k = 0; k < n; ++k) {
      const auto region = r.region(regions[k]);
      const int64_t samples = region.samples(), total = samples * r.pooled_height * wide;
      for (int64_t first = 0; first < total; first += kTileThreads) {
        const int64_t s = first + t, bin = samples > 0 ? s / samples : 0;
        BilinearTap<A> tap{};
        const bool hit = s < total && region.sample(bin / wide, bin % wide, s % samples, map.height, map.width, &tap) &&
                         tap.y + 1 >= tile.y && tap.y < tile.y + kTile && tap.x + 1 >= tile.x &&
                         tap.x < tile.x + kTile;
        const Place place = place_in_block(hit, counts, kTileThreads / kWarp);
        if (hit) hits[place.before] = {int(bin), tap};
        __syncthreads();
        for (int i = 0; here && i < place.all; ++i) {
          const int y = hits[i].tap.y - tile.y - tile.row;
          if (y < -1 || y >= kTileRows) continue;
          add_sample(hits[i].tap, tile, load(grad + regions[k] * task.stride_roi + hits[i].bin * task.stride_bin), sum);
        }
        __syncthreads();
      }
    }
  });
  if (here) write_tile(task.tiled.maps[0], map, tile, [&](int i, int j) { return sum[i][j]; });
}

// ---- shell ----------------------------------------------------------------------------------------------------------

Tensor roi_align_rotated_backward_cuda(const Tensor& grad_any, const Tensor& boxes, double spatial_scale,
                                       int64_t pooled_height, int64_t pooled_width, int64_t batch_size,
                                       int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio,
                                       bool aligned, bool clockwise) {
  check_pooled(grad_any, "grad", boxes, channels, pooled_height, pooled_width);
  const Tensor grad = with_one_bin_stride(grad_any);
  const Tensor map =
      empty_on(grad, {batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  const Stream stream(grad);
  const RotatedConstants c{spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise};
  dispatch_rotated_regions(map, boxes, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using R = std::decay_t<decltype(regions)>;
    const TiledMaps<T> tiled = tile_maps<T>({map});
    with_groups(stream, grad, regions, [&](const RoiGroups& groups) {
      const Backward<T, R> task{regions,        tiled,          groups,        data<T>(grad),
                                grad.stride(0), grad.stride(1), grad.stride(3)};
      stream.launch(roi_align_rotated_backward_kernel<T, R>,
                    {tiled.first_tile[1], ceil_div(channels, kTileChannels)}, kTileThreads, 0, task);
    });
  });
  return map;
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("roi_align_rotated_backward", TORCH_BOX(&fastcv::cuda::roi_align_rotated_backward_cuda));
}
