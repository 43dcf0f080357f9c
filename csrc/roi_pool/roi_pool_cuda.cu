// RoI pooling on the device.
//
// A block of threads has a region and up to 256 channels. The pixels of all its bins along both axes are made once,
// by a thread each, in shared memory; then threads share out bins and channels. On channels-last maps a thread
// compares 16 bytes of channels at a time; on others neighbouring threads have neighbouring bins of a channel, so
// that their loads meet in the same lines and their stores are in order.
//
// Floor for 1000 regions of 256 channels, 7 x 7 bins, on 200 x 272 pixels in float32: the map once, 56 MB, and 100 MB
// of values and positions, 36 us at 4.3 TB/s. Each pixel of a region is compared once, and twice where bins overlap:
// 0.2 G comparisons of a few instructions each are less.
//
// A region whose batch index is no image gives NaN: to raise, as the CPU does, would wait for the device.
#include "roi_pool_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kThreads = 256, kChannels = 256;

template <class T, class C>
struct Forward {
  PoolRegions<C> regions;
  const T* map;
  T* output;        // [K, C, PH, PW]
  int32_t* argmax;  // the same
  int64_t stride_roi, stride_c, stride_bin;
  bool by_channel;  // threads next to each other have channels next to each other
};

template <int V, class A>
struct Maxima {
  A value[V];
  int32_t position[V];
};

// NaN never wins: it compares false. A bin of nothing but NaN gives -infinity at its first pixel.
template <int V, class T, class A>
__device__ void max_bin(const T* features, const RoiMapLevel& m, PixelRange rows, PixelRange columns,
                        Maxima<V, A>& best) {
  const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
  const int32_t first = empty ? -1 : rows.begin * int32_t(m.width) + columns.begin;
#pragma unroll
  for (int k = 0; k < V; ++k) best.value[k] = empty ? A(0) : -A(INFINITY), best.position[k] = first;
  for (int32_t y = rows.begin; y < rows.end; ++y)
    for (int32_t x = columns.begin; x < columns.end; ++x) {
      const auto pixel = *reinterpret_cast<const Vector<T, V>*>(features + y * m.stride_y + x * m.stride_x);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A value = to_accumulate(pixel.lane[k]);
        if (value > best.value[k]) best.value[k] = value, best.position[k] = y * int32_t(m.width) + x;
      }
    }
}

template <int V, class T, class A>
__device__ void write_bin(const Maxima<V, A>& best, T* output, int32_t* argmax) {
  Vector<T, V> values;
  Vector<int32_t, V> positions;
#pragma unroll
  for (int k = 0; k < V; ++k) store(&values.lane[k], best.value[k]), positions.lane[k] = best.position[k];
  *reinterpret_cast<Vector<T, V>*>(output) = values;
  *reinterpret_cast<Vector<int32_t, V>*>(argmax) = positions;
}

template <class T, class C, int V>
__global__ void __launch_bounds__(kThreads, 4) roi_pool_forward_kernel(const __grid_constant__ Forward<T, C> task) {
  using A = accumulate_t<T>;
  const PoolRegions<C>& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  PixelRange* const ranges = dynamic_shared<PixelRange>();  // [PH + PW]
  const int64_t roi = blockIdx.x, channel = int64_t(blockIdx.y) * kChannels, image = r.image_of(roi);
  const int high = int(r.pooled_height), wide = int(r.pooled_width), bins = high * wide, t = int(threadIdx.x);
  for (int b = t; b < high + wide; b += kThreads)
    ranges[b] = b < high ? r.rows(roi, map).range(b, map.height) : r.columns(roi, map).range(b - high, map.width);
  __syncthreads();
  const T* const features = task.map + (image < 0 ? 0 : image) * map.stride_n + channel * map.stride_c;
  const int64_t origin = roi * task.stride_roi + channel * task.stride_c;
  const int vectors = int(r.channels - channel < kChannels ? r.channels - channel : kChannels) / V;
  for (int item = t; item < bins * vectors; item += kThreads) {
    const int inner = task.by_channel ? vectors : bins, quotient = item / inner, rest = item - quotient * inner;
    const int bin = task.by_channel ? quotient : rest, c = (task.by_channel ? rest : quotient) * V;
    Maxima<V, A> best;
    if (image < 0) {
#pragma unroll
      for (int k = 0; k < V; ++k) best.value[k] = A(NAN), best.position[k] = -1;
    } else {
      max_bin(features + c * map.stride_c, map, ranges[bin / wide], ranges[high + bin % wide], best);
    }
    const int64_t at = origin + c * task.stride_c + bin * task.stride_bin;
    write_bin(best, task.output + at, task.argmax + at);
  }
}

// ---- shell ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> roi_pool_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale,
                                         int64_t pooled_height, int64_t pooled_width) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const RoiConstants c{pooled_height, pooled_width, 0, false};
  check_pool(boxes, c, spatial_scale, input.size(2), input.size(3));
  const std::vector<int64_t> size{boxes.size(0), input.size(1), pooled_height, pooled_width};
  const MemoryFormat format = memory_format(input);
  const Tensor output = empty_on(input, size, input.scalar_type(), format),
               argmax = empty_on(input, size, ScalarType::Int, format);
  const Stream stream(input);
  dispatch_pool_regions(input, boxes, spatial_scale, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using C = typename std::decay_t<decltype(regions)>::Coordinate;
    const Forward<T, C> task{regions,
                             data<T>(input),
                             mutable_data<T>(output),
                             mutable_data<int32_t>(argmax),
                             output.stride(0),
                             output.stride(1),
                             output.stride(3),
                             output.stride(1) == 1};
    constexpr int kVector = int(16 / sizeof(T));
    const bool vectors = has_vectors(input, kVector) && has_vectors(output, kVector) && has_vectors(argmax, kVector);
    const auto kernel = vectors ? roi_pool_forward_kernel<T, C, kVector> : roi_pool_forward_kernel<T, C, 1>;
    stream.launch(kernel, {boxes.size(0), ceil_div(input.size(1), kChannels)}, kThreads,
                  size_t(pooled_height + pooled_width) * sizeof(PixelRange), task);
  });
  return {output, argmax};
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("roi_pool", TORCH_BOX(&fastcv::cuda::roi_pool_cuda)); }
