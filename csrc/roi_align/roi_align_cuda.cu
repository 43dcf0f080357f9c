// RoIAlign on the device, all levels of a pyramid in one launch.
//
// A block of threads has a region and up to 256 channels. The taps of all its bins (roi_align.h) are made once, by a
// thread each, in shared memory; then threads share out bins and channels. On channels-last maps a thread loads 16
// bytes of channels at a time; on others neighbouring threads have neighbouring bins of a channel, so that their
// loads meet in the same lines and their stores are in order. Where a bin has more taps than there is room for, its
// samples are taken eight at a time along each axis.
//
// Floor for 1000 regions of 256 channels, 7 x 7 bins, sampling ratio 2, on 200 x 272 pixels in float32: the map once,
// 56 MB, and 50 MB of output, 25 us at 4.3 TB/s; 16 taps a bin are 0.2 G multiply-adds, 7 us.
//
// A region whose batch index is no image gives NaN: to raise, as the CPU does, would wait for the device.
#include "roi_align_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kThreads = 256, kChannels = 256;
constexpr int kTaps = 16, kSamples = kTaps / 2;  // of a bin along an axis, in shared memory

template <class T, class C>
struct Forward {
  RoiRegions<C> regions;
  const T* maps[kMostLevels];
  T* output;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  bool by_channel;  // threads next to each other have channels next to each other
};

// Adds the weighted pixels of one bin for V channels.
template <int V, class T, class A>
__device__ void add_taps(const T* map, const RoiMapLevel& m, const Tap<A>* y, int rows, const Tap<A>* x, int columns,
                         A (&sum)[V]) {
  for (int i = 0; i < rows; ++i)
#pragma unroll 4  // more does not fit in registers
    for (int j = 0; j < columns; ++j) {
      const A weight = y[i].weight * x[j].weight;
      const auto v = *reinterpret_cast<const Vector<T, V>*>(map + y[i].index * m.stride_y + x[j].index * m.stride_x);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += weight * to_accumulate(v.lane[k]);
    }
}

template <int V, class T, class A>
__device__ void write_bin(const A (&sum)[V], T* to) {
  Vector<T, V> v;
#pragma unroll
  for (int k = 0; k < V; ++k) store(&v.lane[k], sum[k]);
  *reinterpret_cast<Vector<T, V>*>(to) = v;
}

// Up to kSamples samples from `first` on; returns how many taps they have.
template <class C, class A>
__device__ int append_piece(const RoiAxis<C>& axis, int64_t p, int64_t size, int64_t first, int64_t last,
                            Tap<A>* taps) {
  const int64_t end = first + kSamples < last ? first + kSamples : last;
  return int(append_samples(axis, p, size, first, end, taps) - taps);
}

// The region of a block of threads.
template <class T, class C>
struct Region {
  const Forward<T, C>& task;
  const RoiMapLevel& map;
  const T* features;  // of its image and first channel
  T* output;
  RoiAxis<C> rows, columns;
  int bins, channels;

  __device__ bool fits() const {
    return rows.taps_per_bin(map.height) <= kTaps && columns.taps_per_bin(map.width) <= kTaps;
  }

  // All taps are made before they are used. taps: kTaps for each bin of both axes, counts: how many there are.
  template <int V>
  __device__ void pool(Tap<accumulate_t<T>>* taps, int* counts) const {
    const int high = int(task.regions.pooled_height), wide = int(task.regions.pooled_width), t = int(threadIdx.x);
    for (int b = t; b < high + wide; b += kThreads) {
      RoiAxis<C> axis = rows;
      if (b >= high) axis = columns;
      const int64_t p = b < high ? b : b - high, size = b < high ? map.height : map.width;
      int64_t first, last;
      axis.sample_range(p, size, &first, &last);
      counts[b] = int(append_samples(axis, p, size, first, last, taps + b * kTaps) - (taps + b * kTaps));
    }
    __syncthreads();
    const int vectors = channels / V;
    for (int item = t; item < bins * vectors; item += kThreads) {
      const int inner = task.by_channel ? vectors : bins, quotient = item / inner, rest = item - quotient * inner;
      const int bin = task.by_channel ? quotient : rest, c = (task.by_channel ? rest : quotient) * V;
      const int y = bin / wide, x = high + bin % wide;
      accumulate_t<T> sum[V] = {};
      add_taps<V>(features + c * map.stride_c, map, taps + y * kTaps, counts[y], taps + x * kTaps, counts[x], sum);
      write_bin<V>(sum, output + c * task.stride_c + bin * task.stride_bin);
    }
  }

  // One bin after the other; a thread has V channels of it.
  template <int V>
  __device__ void pool_in_pieces(Tap<accumulate_t<T>>* taps, int* counts) const {
    const int t = int(threadIdx.x);
    const bool here = t * V < channels;
    const int wide = int(task.regions.pooled_width);
    for (int bin = 0; bin < bins; ++bin) {
      const int ph = bin / wide, pw = bin % wide;
      int64_t top, bottom, left, right;  // samples
      rows.sample_range(ph, map.height, &top, &bottom);
      columns.sample_range(pw, map.width, &left, &right);
      accumulate_t<T> sum[V] = {};
      for (int64_t i = top; i < bottom; i += kSamples)
        for (int64_t j = left; j < right; j += kSamples) {
          __syncthreads();
          if (t == 0) counts[0] = append_piece(rows, ph, map.height, i, bottom, taps);
          if (t == kWarp) counts[1] = append_piece(columns, pw, map.width, j, right, taps + kTaps);
          __syncthreads();
          if (here) add_taps<V>(features + t * V * map.stride_c, map, taps, counts[0], taps + kTaps, counts[1], sum);
        }
      if (here) write_bin<V>(sum, output + t * V * task.stride_c + bin * task.stride_bin);
    }
  }
};

template <class T, class C, int V>
__global__ void __launch_bounds__(kThreads, 2) roi_align_forward_kernel(const __grid_constant__ Forward<T, C> task) {
  using A = accumulate_t<T>;
  const RoiRegions<C>& r = task.regions;
  Tap<A>* const taps = dynamic_shared<Tap<A>>();
  int* const counts = reinterpret_cast<int*>(taps + (r.pooled_height + r.pooled_width) * kTaps);
  const int64_t roi = blockIdx.x, channel = int64_t(blockIdx.y) * kChannels, image = r.image_of(roi);
  const int level = r.level_of(roi);
  const RoiMapLevel& map = r.level[level];
  const Region<T, C> region{task,
                            map,
                            task.maps[level] + (image < 0 ? 0 : image) * map.stride_n + channel * map.stride_c,
                            task.output + roi * task.stride_roi + channel * task.stride_c,
                            r.rows(roi, map),
                            r.columns(roi, map),
                            int(r.pooled_height * r.pooled_width),
                            int(r.channels - channel < kChannels ? r.channels - channel : kChannels)};
  if (image < 0) {
    for (int i = int(threadIdx.x); i < region.bins * region.channels; i += kThreads)
      store(region.output + i / region.bins * task.stride_c + i % region.bins * task.stride_bin, A(NAN));
  } else if (region.fits()) {
    region.template pool<V>(taps, counts);
  } else {
    region.template pool_in_pieces<V>(taps, counts);
  }
}

// ---- shells ---------------------------------------------------------------------------------------------------------

using Levels = std::vector<Tensor>;

template <class T, class C>
void forward(const Levels& inputs, const Tensor& boxes, const std::vector<double>& scales, const RoiConstants& c,
             const Tensor& output) {
  const Stream stream(output);
  Forward<T, C> task{make_regions<C>(inputs, boxes, scales, c), {}, mutable_data<T>(output), output.stride(0),
                     output.stride(1), output.stride(3), output.stride(1) == 1};
  constexpr int kVector = int(16 / sizeof(T));
  bool vectors = has_vectors(output, kVector);
  for (size_t i = 0; i < inputs.size(); ++i) {
    task.maps[i] = data<T>(inputs[i]);
    vectors &= has_vectors(inputs[i], kVector);
  }
  const int64_t bins = c.pooled_height + c.pooled_width;
  const size_t shared = size_t(bins) * (kTaps * sizeof(Tap<accumulate_t<T>>) + sizeof(int));
  STD_TORCH_CHECK(shared <= 96 << 10, "output_size: expected at most ", (96 << 10) / (shared / bins),
                  " bins along both axes together, got ", bins);
  const auto kernel = vectors ? roi_align_forward_kernel<T, C, kVector> : roi_align_forward_kernel<T, C, 1>;
  stream.launch(kernel, {boxes.size(0), ceil_div(inputs[0].size(1), kChannels)}, kThreads, shared, task);
}

Tensor run_forward(const Levels& inputs, const Tensor& boxes_any, const std::vector<double>& scales,
                   const RoiConstants& c) {
  check_regions(boxes_any, scales, inputs.size(), c);
  for (const Tensor& input : inputs)
    STD_TORCH_CHECK(input.dim() == 4 && input.size(0) == inputs[0].size(0) && input.size(1) == inputs[0].size(1) &&
                        input.scalar_type() == inputs[0].scalar_type() && input.size(2) < INT32_MAX &&
                        input.size(3) < INT32_MAX,
                    "inputs: expected 4-D maps [N, C, H, W] of one N, C and dtype");
  const Tensor output = empty_on(inputs[0], {boxes_any.size(0), inputs[0].size(1), c.pooled_height, c.pooled_width},
                                 inputs[0].scalar_type(), memory_format(inputs[0]));
  dispatch_regions(output.scalar_type(), boxes_any.scalar_type(), [&](auto feature, auto coordinate) {
    using C = decltype(coordinate);
    const Tensor boxes = as_contiguous(boxes_any, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
    forward<decltype(feature), C>(inputs, boxes, scales, c, output);
  });
  return output;
}

Tensor roi_align_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                      int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  return run_forward({input}, boxes, {spatial_scale}, {pooled_height, pooled_width, sampling_ratio, aligned});
}

Tensor multiscale_roi_align_cuda(const std::vector<Tensor>& inputs, const Tensor& boxes,
                                 const std::vector<double>& spatial_scales, int64_t pooled_height, int64_t pooled_width,
                                 int64_t sampling_ratio, bool aligned, int64_t canonical_scale,
                                 int64_t canonical_level) {
  return run_forward(inputs, boxes, spatial_scales,
                     {pooled_height, pooled_width, sampling_ratio, aligned, canonical_scale, canonical_level});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("roi_align", TORCH_BOX(&fastcv::cuda::roi_align_cuda));
  m.impl("multiscale_roi_align", TORCH_BOX(&fastcv::cuda::multiscale_roi_align_cuda));
}
