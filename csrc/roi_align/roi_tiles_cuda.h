// Gradients of region pooling without atomics, so that they are the same at every run: what their kernels share.
//
// A block of threads owns a tile of 8 x 8 pixels of one image and 64 channels, a thread two rows of one channel of it:
// each pixel is summed by one thread and written once. Regions are put in the order of their level and image. The block
// goes through those of its image, 256 at a time: those whose extent meets the tile are listed in their order, and the
// kernel adds them one after the other. Memory: 28 bytes for a region, and what the sort needs.
#pragma once

#include "../common/cuda_places.h"
#include "roi_align_cuda.h"
#include "roi_tensors.h"

namespace fastcv::cuda {

constexpr int kTile = 8, kTileChannels = 64, kTileThreads = 256, kTileRows = kTile * kTileChannels / kTileThreads;
// Blocks of threads on a multiprocessor, by the type of coordinates: those of double take more registers.
template <class C>
constexpr int kTileBlocks = sizeof(C) == 8 ? 2 : 3;

// The pixels that a region may touch: rows from top to bottom, with bottom; none where it is below top.
struct Extent {
  int32_t top, bottom, left, right;
};

// Regions in the order of their groups: of their level, then image.
struct RoiGroups {
  const int64_t* order;   // [K] regions by group
  const int32_t* group;   // [K] by region
  const Extent* extents;  // [K] by region
  int64_t count;
};

// The gradients to be written, one map for each level, and the tiles of all.
template <class T>
struct TiledMaps {
  T* maps[kMostLevels];
  int64_t first_tile[kMostLevels + 1];
};

// What a block of threads owns, and which part of it is this thread's.
struct RoiTile {
  int level;
  int64_t image;
  int32_t y, x;  // the first pixel
  int32_t group;
  int64_t channel;  // may lie past the last
  int row;          // the first of kTileRows within the tile
};

// ---- in kernels -----------------------------------------------------------------------------------------------------

template <class T, class C>
__device__ RoiTile own_tile(const TiledMaps<T>& tiled, const RoiRegions<C>& r) {
  int level = 0;
  while (level + 1 < r.levels && int64_t(blockIdx.x) >= tiled.first_tile[level + 1]) ++level;
  const uint32_t tile = uint32_t(int64_t(blockIdx.x) - tiled.first_tile[level]);
  const uint32_t wide = uint32_t(ceil_div(r.level[level].width, kTile)),
                 high = uint32_t(ceil_div(r.level[level].height, kTile));
  const uint32_t line = tile / wide, image = line / high, t = threadIdx.x;
  return {level,
          image,
          int32_t((line - image * high) * kTile),
          int32_t((tile - line * wide) * kTile),
          int32_t(level * r.images + image),
          int64_t(blockIdx.y) * kTileChannels + t % kTileChannels,
          int(t) / kTileChannels * kTileRows};
}

// The first place in the order whose region is of a group.
inline __device__ int64_t group_begin(const RoiGroups& list, int32_t group) {
  int64_t begin = 0;
  for (int64_t end = list.count; begin < end;) {
    const int64_t middle = (begin + end) / 2;
    if (list.group[list.order[middle]] < group)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// f(regions, n) with those that meet the tile, in their order and up to kTileThreads at a time. All threads of the
// block come together; the regions lie in shared memory until all have returned.
template <class F>
__device__ void each_region_of_tile(const RoiGroups& list, const RoiTile& tile, const F& f) {
  __shared__ int32_t hits[kTileThreads];
  __shared__ int counts[kTileThreads / kWarp];
  const int t = int(threadIdx.x);
  for (int64_t first = group_begin(list, tile.group);; first += kTileThreads) {
    const int64_t i = first + t, roi = i < list.count ? list.order[i] : 0;
    const bool mine = i < list.count && list.group[roi] == tile.group;
    bool hit = false;
    if (mine) {
      const Extent e = list.extents[roi];
      hit = e.top - kTile < tile.y && e.bottom >= tile.y && e.left - kTile < tile.x && e.right >= tile.x;
    }
    const Place place = place_in_block(hit, counts, kTileThreads / kWarp);
    if (hit) hits[place.before] = int32_t(roi);
    const bool more = __syncthreads_or(mine);
    f(hits, place.all);
    __syncthreads();
    if (!more) break;
  }
}

// The weight of bin p on each of a tile's pixels along an axis; returns whether there is any.
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

// value(i, j): of pixel j of the thread's row i.
template <class T, class F>
__device__ void write_tile(T* map, const RoiMapLevel& m, const RoiTile& tile, const F& value) {
  T* const to = map + tile.image * m.stride_n + tile.channel * m.stride_c;
#pragma unroll
  for (int i = 0; i < kTileRows; ++i)
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int64_t y = int64_t(tile.y) + tile.row + i, x = int64_t(tile.x) + j;
      if (y < m.height && x < m.width) store(to + y * m.stride_y + x * m.stride_x, value(i, j));
    }
}

// Axes are asked for the pixels that their bins may touch.
template <class R>
__global__ void roi_extents_kernel(const __grid_constant__ R regions, int32_t* group, Extent* extents) {
  const int64_t roi = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (roi >= regions.count) return;
  const int level = regions.level_of(roi);
  const int64_t image = regions.image_of(roi);
  const RoiMapLevel& map = regions.level[level];
  Extent e;
  regions.rows(roi, map).extent(regions.pooled_height, map.height, &e.top, &e.bottom);
  regions.columns(roi, map).extent(regions.pooled_width, map.width, &e.left, &e.right);
  extents[roi] = e;
  // The last group: no image's.
  group[roi] = int32_t(image < 0 ? regions.levels * regions.images : level * regions.images + image);
}

// ---- on the host ----------------------------------------------------------------------------------------------------

// f(groups), to launch what reads them.
template <class R, class F>
void with_groups(const Stream& stream, const Tensor& like, const R& regions, const F& f) {
  const Tensor group = empty_on(like, {regions.count}, ScalarType::Int),
               extents = empty_on(like, {regions.count, 4}, ScalarType::Int);
  stream.launch(roi_extents_kernel<R>, {ceil_div(regions.count, kTileThreads)}, kTileThreads, 0, regions,
                mutable_data<int32_t>(group), reinterpret_cast<Extent*>(mutable_data<int32_t>(extents)));
  const Tensor order = stable_argsort(group, false);
  f(RoiGroups{data<int64_t>(order), data<int32_t>(group), reinterpret_cast<const Extent*>(data<int32_t>(extents)),
              regions.count});
}

template <class T>
TiledMaps<T> tile_maps(const std::vector<Tensor>& maps) {
  TiledMaps<T> tiled{};
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& m = maps[i];
    tiled.maps[i] = mutable_data<T>(m);
    tiled.first_tile[i + 1] =
        tiled.first_tile[i] + m.size(0) * ceil_div(m.size(2), kTile) * ceil_div(m.size(3), kTile);
  }
  return tiled;
}

}  // namespace fastcv::cuda
