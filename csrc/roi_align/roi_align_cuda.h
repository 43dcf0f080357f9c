// What the CUDA kernels of RoIAlign share, forward and backward: the task of one call, over all levels of a pyramid.
#pragma once

#include <cmath>

#include "../common/cuda_launch.h"
#include "roi_align.h"

namespace fastcv::cuda {

constexpr int kMostLevels = 8;

struct RoiMapLevel {
  int64_t height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;
  double scale, number;  // number: -log2(scale), rounded
};

// C: the type of coordinates.
template <class C>
struct RoiRegions {
  using Coordinate = C;
  using Axis = RoiAxis<C>;
  static constexpr int kForwardBlocks = 2;  // on a multiprocessor, for which there are registers enough
  const C* boxes;  // [K, 5]
  int64_t count, images, channels, pooled_height, pooled_width, sampling_ratio;
  double offset;            // subtracted from scaled coordinates: half a pixel where aligned
  bool at_least_one_pixel;  // regions under a pixel are widened to one
  int64_t canonical_scale, canonical_level;
  int levels;
  RoiMapLevel level[kMostLevels];

  __device__ int level_of(int64_t roi) const {
    return roi_level(boxes + 5 * roi, levels - 1, canonical_scale, canonical_level,
                     [&](int32_t i) { return level[i].number; });
  }
  // The image of a region; -1 where its batch index is none: CUDA kernels cannot raise.
  __device__ int64_t image_of(int64_t roi) const {
    const C index = boxes[5 * roi];
    return index >= 0 && index < C(images) ? int64_t(index) : -1;
  }
  __device__ RoiAxis<C> rows(int64_t roi, const RoiMapLevel& map) const {
    const C* box = boxes + 5 * roi;
    return {box[2], box[4], C(map.scale), C(offset), at_least_one_pixel, pooled_height, sampling_ratio};
  }
  __device__ RoiAxis<C> columns(int64_t roi, const RoiMapLevel& map) const {
    const C* box = boxes + 5 * roi;
    return {box[1], box[3], C(map.scale), C(offset), at_least_one_pixel, pooled_width, sampling_ratio};
  }
};

// Loaded and stored at once.
template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T lane[V];
};

template <int V, class T, class A>
__device__ void write_bin(const A (&sum)[V], T* to) {
  Vector<T, V> v;
#pragma unroll
  for (int k = 0; k < V; ++k) store(&v.lane[k], sum[k]);
  *reinterpret_cast<Vector<T, V>*>(to) = v;
}

struct RoiConstants {
  int64_t pooled_height, pooled_width, sampling_ratio;
  bool aligned;
  int64_t canonical_scale = 0, canonical_level = 0;
};

// maps: of features or of their gradients. boxes: contiguous, of type C.
template <class C>
RoiRegions<C> make_regions(const std::vector<Tensor>& maps, const Tensor& boxes, const std::vector<double>& scales,
                           const RoiConstants& c) {
  RoiRegions<C> r{data<C>(boxes),   boxes.size(0),    maps[0].size(0),    maps[0].size(1),   c.pooled_height,
                  c.pooled_width,   c.sampling_ratio, c.aligned ? 0.5 : 0, !c.aligned,       c.canonical_scale,
                  c.canonical_level, int(maps.size()), {}};
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& m = maps[i];
    r.level[i] = {m.size(2),   m.size(3),   m.stride(0), m.stride(1),
                  m.stride(2), m.stride(3), scales[i],   std::round(-std::log2(scales[i]))};
  }
  return r;
}

// Whether V channels of every pixel lie side by side where 16 bytes are loaded at once.
inline bool has_vectors(const Tensor& x, int64_t lanes) {
  bool fits = x.size(1) % lanes == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int d : {0, 2, 3}) fits &= x.size(d) <= 1 || x.stride(d) % lanes == 0;
  return fits && x.stride(1) == 1;
}

inline void check_regions(const Tensor& boxes, const std::vector<double>& scales, size_t maps, const RoiConstants& c) {
  STD_TORCH_CHECK(maps > 0 && maps == scales.size(), "inputs: expected one tensor per spatial scale, got ", maps,
                  " tensors and ", scales.size(), " scales");
  STD_TORCH_CHECK(maps <= size_t(kMostLevels), "inputs: expected at most ", kMostLevels, " levels, got ", maps);
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes: expected shape [K, 5]");
  STD_TORCH_CHECK(boxes.size(0) < INT32_MAX, "boxes: expected fewer than 2^31 regions, got ", boxes.size(0));
  STD_TORCH_CHECK(c.pooled_height > 0 && c.pooled_width > 0, "output_size: expected at least 1 x 1, got ",
                  c.pooled_height, " x ", c.pooled_width);
  STD_TORCH_CHECK(c.sampling_ratio <= 1 << 30, "sampling_ratio: expected at most 2^30, got ", c.sampling_ratio);
}

// f(T{}, C{}) with the type of the features and that of coordinates: double where boxes or features are, float
// otherwise.
template <class F>
void dispatch_regions(ScalarType features, ScalarType boxes, const F& f) {
  dispatch_floating(features, "input", [&](auto feature) {
    if (sizeof(feature) == 8 || boxes == ScalarType::Double)
      f(feature, double{});
    else if constexpr (sizeof(feature) < 8)
      f(feature, float{});
  });
}

}  // namespace fastcv::cuda
