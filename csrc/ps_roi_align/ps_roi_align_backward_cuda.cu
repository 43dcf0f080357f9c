// The gradient of position-sensitive RoI pooling without atomics (../roi_align/roi_tiles_cuda.h): a block of threads
// owns a tile of 8 x 8 pixels and 64 input channels.
//
// Each channel belongs to one bin, so a region adds one element of the gradient to a channel, times the weights of that
// bin's rows and columns on the tile. These are few products for a region: so weights are made for up to 16 regions at
// once, by a thread for each bin of an axis, and a thread adds those of its two rows of one channel in registers.
//
// Bytes: an element of the gradient for each tile that its bin meets, by the four warps that have the tile's rows;
// the map once. Floor for R-FCN (300 regions, 21 classes, 7 x 7 bins, a map of 1029 channels x 38 x 63 in float32):
// 11 MB, 3 us at 4.3 TB/s. 680 blocks go through the 300 regions; a region of 16 x 16 pixels meets about 9 of the 40
// tiles, for which 17 blocks make its 14 rows of weights.
#include "../roi_align/roi_tiles_cuda.h"
#include "ps_roi_align_cuda.h"

namespace fastcv::cuda {

template <class C, class A>
__device__ bool tile_weights(const MeanAxis<C>& axis, int64_t p, int64_t size, int64_t origin, A* weights) {
  int64_t first, last;
  axis.sample_range(p, size, &first, &last);
  const A weight = last > first ? A(1) / A(last - first) : 0;
#pragma unroll
  for (int i = 0; i < kTile; ++i) weights[i] = origin + i >= first && origin + i < last ? weight : 0;
  return first < origin + kTile && last > origin && first < last;
}

namespace {

constexpr int kMostAtOnce = 16;  // regions

template <class T, class R>
struct Backward {
  R regions;
  TiledMaps<T> tiled;
  RoiGroups groups;
  const T* grad;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  int at_once;  // regions
};

template <class T, class R>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<typename R::Coordinate>)
    ps_roi_align_backward_kernel(const __grid_constant__ Backward<T, R> task) {
  using A = accumulate_t<T>;
  const R& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  const int high = int(r.pooled_height), wide = int(r.pooled_width), axis_bins = high + wide, t = int(threadIdx.x);
  A* const weights = dynamic_shared<A>();  // [regions at once][PH + PW][kTile]
  bool* const meets = reinterpret_cast<bool*>(weights + task.at_once * axis_bins * kTile);  // [regions][PH + PW]
  const RoiTile tile = own_tile(task.tiled, r);
  const int channel = tile.channel < r.channels ? int(tile.channel) : 0, c = channel / (high * wide);
  const int bin = channel - c * high * wide, ph = bin / wide, pw = high + bin % wide;
  const T* const grad = task.grad + c * task.stride_c + bin * task.stride_bin;
  A sum[kTileRows][kTile] = {};
  each_region_of_tile(task.groups, tile, [&](const int32_t* regions, int n) {
    for (int from = 0; from < n; from += task.at_once) {
      const int some = n - from < task.at_once ? n - from : task.at_once;
      for (int i = t; i < some * axis_bins; i += kTileThreads) {
        const int k = i / axis_bins, b = i - k * axis_bins;
        const bool vertical = b < high;
        auto axis = r.rows(regions[from + k], map);
        if (!vertical) axis = r.columns(regions[from + k], map);
        meets[i] = tile_weights(axis, vertical ? b : b - high, vertical ? map.height : map.width,
                                vertical ? tile.y : tile.x, weights + i * kTile);
      }
      __syncthreads();
      for (int k = 0; k < some; ++k) {
        if (!meets[k * axis_bins + ph] || !meets[k * axis_bins + pw]) continue;
        const A g = load(grad + regions[from + k] * task.stride_roi);
        const A* const rows = weights + (k * axis_bins + ph) * kTile + tile.row;
        const A* const columns = weights + (k * axis_bins + pw) * kTile;
#pragma unroll
        for (int i = 0; i < kTileRows; ++i) {
          const A row = rows[i];
          if (row == 0) continue;  // an infinite gradient must not meet it
#pragma unroll
          for (int j = 0; j < kTile; ++j)
            if (columns[j] != 0) sum[i][j] += g * row * columns[j];
        }
      }
      __syncthreads();
    }
  });
  if (tile.channel < r.channels)
    write_tile(task.tiled.maps[0], map, tile, [&](int i, int j) { return sum[i][j]; });
}

// ---- shells ---------------------------------------------------------------------------------------------------------

struct MapSize {
  int64_t images, channels, height, width;
};

Tensor run_backward(const Tensor& grad_any, const Tensor& boxes, const PsConstants& c, const MapSize& size) {
  check_ps_regions(boxes, c, size.channels);
  const int64_t bins = c.pooled_height * c.pooled_width;
  STD_TORCH_CHECK(grad_any.dim() == 4 && grad_any.size(0) == boxes.size(0) &&
                      grad_any.size(1) * bins == size.channels && grad_any.size(2) == c.pooled_height &&
                      grad_any.size(3) == c.pooled_width,
                  "grad: expected shape [", boxes.size(0), ", ", size.channels, " / ", bins, ", ", c.pooled_height,
                  ", ", c.pooled_width, "]");
  STD_TORCH_CHECK(size.height < INT32_MAX && size.width < INT32_MAX,
                  "input: expected fewer than 2^31 rows and columns");
  const Tensor grad = with_one_bin_stride(grad_any);
  const Tensor map = empty_on(grad, {size.images, size.channels, size.height, size.width}, grad.scalar_type(),
                              memory_format(grad_any));
  const Stream stream(grad);
  dispatch_ps_regions(map, boxes, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using R = std::decay_t<decltype(regions)>;
    const size_t most = 96 << 10, each = size_t(c.axis_bins()) * (kTile * sizeof(accumulate_t<T>) + sizeof(bool));
    STD_TORCH_CHECK(each <= most, "output_size: ", c.pooled_height, " x ", c.pooled_width, " bins are too many");
    const int at_once = int(std::clamp<size_t>(most / 4 / each, 1, kMostAtOnce));
    const TiledMaps<T> tiled = tile_maps<T>({map});
    with_groups(stream, grad, regions, [&](const RoiGroups& groups) {
      const Backward<T, R> task{regions,        tiled,          groups,         data<T>(grad),
                                grad.stride(0), grad.stride(1), grad.stride(3), at_once};
      stream.launch(ps_roi_align_backward_kernel<T, R>,
                    {tiled.first_tile[1], ceil_div(size.channels, kTileChannels)}, kTileThreads, at_once * each, task);
    });
  });
  return map;
}

Tensor ps_roi_align_backward_cuda(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                                  int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                                  int64_t width, int64_t sampling_ratio) {
  return run_backward(grad, boxes, {false, spatial_scale, pooled_height, pooled_width, sampling_ratio},
                      {batch_size, channels, height, width});
}

Tensor ps_roi_pool_backward_cuda(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                                 int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                                 int64_t width) {
  return run_backward(grad, boxes, {true, spatial_scale, pooled_height, pooled_width, 0},
                      {batch_size, channels, height, width});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("ps_roi_align_backward", TORCH_BOX(&fastcv::cuda::ps_roi_align_backward_cuda));
  m.impl("ps_roi_pool_backward", TORCH_BOX(&fastcv::cuda::ps_roi_pool_backward_cuda));
}
