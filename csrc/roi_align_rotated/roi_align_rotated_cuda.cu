// RoIAlign of rotated regions on the device.
//
// A block of threads has a region and up to 256 channels. The taps of some samples are made by a thread each, in
// shared memory; then threads share out their bins and channels, 16 bytes of channels at a time on channels-last maps.
// A bin of more samples than there is room for is summed in pieces.
//
// Floor for 1000 regions of 256 channels, 7 x 7 bins, sampling ratio 2, on 200 x 272 pixels in float32: the map once,
// 56 MB, and 50 MB of output, 25 us at 4.3 TB/s; 16 taps a bin are 0.2 G multiply-adds, 7 us; their 0.8 GB come from
// the first-level caches, 30 us at 128 bytes a clock.
//
// A region whose batch index is no image gives NaN: to raise, as the CPU does, would wait for the device.
#include "roi_align_rotated_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kThreads = 256, kChannels = 256, kSamples = 256;

template <class T, class R>
struct Forward {
  R regions;
  const T* map;
  T* output;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  bool by_channel;  // threads next to each other have channels next to each other
};

// Adds n samples for V channels.
template <int V, class T, class A>
__device__ void add_samples(const T* features, const RoiMapLevel& m, const BilinearTap<A>* taps, int n, A (&sum)[V]) {
  for (int i = 0; i < n; ++i) {
    const BilinearTap<A>& tap = taps[i];
    if (tap.y < 0) continue;  // outside the map
    const T* const first = features + tap.y * m.stride_y + tap.x * m.stride_x;
    const int64_t right = tap.right * m.stride_x, down = tap.down * m.stride_y;
    const int64_t offsets[] = {0, right, down, down + right};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto v = *reinterpret_cast<const Vector<T, V>*>(first + offsets[k]);
#pragma unroll
      for (int c = 0; c < V; ++c) sum[c] += tap.weight[k] * to_accumulate(v.lane[c]);
    }
  }
}

template <class T, class R, int V>
__global__ void __launch_bounds__(kThreads, 2)
    roi_align_rotated_forward_kernel(const __grid_constant__ Forward<T, R> task) {
  using A = accumulate_t<T>;
  __shared__ BilinearTap<A> taps[kSamples];
  const R& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  const int64_t roi = blockIdx.x, channel = int64_t(blockIdx.y) * kChannels, image = r.image_of(roi);
  const auto region = r.region(roi);
  const T* const features = task.map + (image < 0 ? 0 : image) * map.stride_n + channel * map.stride_c;
  T* const output = task.output + roi * task.stride_roi + channel * task.stride_c;
  const int bins = int(r.pooled_height * r.pooled_width), wide = int(r.pooled_width), t = int(threadIdx.x);
  const int vectors = int(r.channels - channel < kChannels ? r.channels - channel : kChannels) / V;
  const int64_t samples = map.height > 0 && map.width > 0 ? region.samples() : 0;
  const int at_once = samples > 0 && samples < kSamples ? int(kSamples / samples) : 1;  // bins
  // Sample i of a bin and those after it, of some bins; returns how many of each.
  const auto make = [&](int bin, int some, int64_t i) {
    const int n = int(samples - i < kSamples ? samples - i : kSamples);
    __syncthreads();
    for (int s = t; s < some * n; s += kThreads) {
      const int b = bin + s / n;
      if (!region.sample(b / wide, b % wide, i + s % n, map.height, map.width, &taps[s])) taps[s].y = -1;
    }
    __syncthreads();
    return n;
  };
  for (int bin = 0; bin < bins; bin += at_once) {
    const int some = bins - bin < at_once ? bins - bin : at_once;
    const bool whole = samples <= kSamples;
    const int n = whole ? make(bin, some, 0) : 0;
    for (int item = t; item < (whole ? some * vectors : ceil_div(vectors, kThreads) * kThreads); item += kThreads) {
      const int inner = task.by_channel ? vectors : some, quotient = item / inner, rest = item - quotient * inner;
      const int b = whole ? (task.by_channel ? quotient : rest) : 0;
      const int c = (whole ? (task.by_channel ? rest : quotient) : item) * V;
      const bool here = whole || item < vectors;
      A sum[V] = {};
      if (whole) add_samples<V>(features + c * map.stride_c, map, taps + b * n, n, sum);
      for (int64_t i = 0; !whole && i < samples; i += kSamples) {
        const int piece = make(bin, 1, i);
        if (here) add_samples<V>(features + c * map.stride_c, map, taps, piece, sum);
      }
      if (image < 0)
        for (int k = 0; k < V; ++k) sum[k] = A(NAN);
      if (here) write_bin<V>(sum, output + c * task.stride_c + (bin + b) * task.stride_bin);
    }
  }
}

// ---- shell ----------------------------------------------------------------------------------------------------------

Tensor roi_align_rotated_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                              int64_t pooled_width, int64_t sampling_ratio, bool aligned, bool clockwise) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const Tensor output = empty_on(input, {boxes.size(0), input.size(1), pooled_height, pooled_width},
                                 input.scalar_type(), memory_format(input));
  const Stream stream(input);
  const RotatedConstants c{spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise};
  dispatch_rotated_regions(input, boxes, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using R = std::decay_t<decltype(regions)>;
    const Forward<T, R> task{regions,          data<T>(input),   mutable_data<T>(output), output.stride(0),
                             output.stride(1), output.stride(3), output.stride(1) == 1};
    constexpr int kVector = int(16 / sizeof(T));
    const bool vectors = has_vectors(input, kVector) && has_vectors(output, kVector);
    const auto kernel = vectors ? roi_align_rotated_forward_kernel<T, R, kVector>
                                : roi_align_rotated_forward_kernel<T, R, 1>;
    stream.launch(kernel, {boxes.size(0), ceil_div(input.size(1), kChannels)}, kThreads, 0, task);
  });
  return output;
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) { m.impl("roi_align_rotated", TORCH_BOX(&fastcv::cuda::roi_align_rotated_cuda)); }
