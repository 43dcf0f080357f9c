// Regions pooled by their taps on the device, all levels of a pyramid in one launch; R says which taps those are.
//
// A block of threads has a region and up to 256 channels. The taps of all its bins (roi_align.h) are made once, by a
// thread each, in shared memory; then threads share out bins and channels. On channels-last maps a thread loads 16
// bytes of channels at a time; on others neighbouring threads have neighbouring bins of a channel, so that their
// loads meet in the same lines and their stores are in order. Where a bin has more taps than there is room for, its
// samples are taken eight at a time along each axis.
#pragma once

#include "roi_align_cuda.h"

namespace fastcv::cuda {

constexpr int kThreads = 256, kChannels = 256;
constexpr int kTaps = 16, kSamples = kTaps / 2;  // of a bin along an axis, in shared memory

template <class T, class R>
struct RoiForward {
  R regions;
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

// Up to kSamples samples from `first` on; returns how many taps they have.
template <class Axis, class A>
__device__ int append_piece(const Axis& axis, int64_t p, int64_t size, int64_t first, int64_t last,
                            Tap<A>* taps) {
  const int64_t end = first + kSamples < last ? first + kSamples : last;
  return int(append_samples(axis, p, size, first, end, taps) - taps);
}

// The region of a block of threads.
template <class T, class R>
struct Region {
  using Axis = typename R::Axis;
  const RoiForward<T, R>& task;
  const RoiMapLevel& map;
  const T* features;  // of its image and first channel
  T* output;
  Axis rows, columns;
  int bins, channels;

  __device__ bool fits() const {
    return rows.taps_per_bin(map.height) <= kTaps && columns.taps_per_bin(map.width) <= kTaps;
  }

  // All taps are made before they are used. taps: kTaps for each bin of both axes, counts: how many there are.
  template <int V>
  __device__ void pool(Tap<accumulate_t<T>>* taps, int* counts) const {
    const int high = int(task.regions.pooled_height), wide = int(task.regions.pooled_width), t = int(threadIdx.x);
    for (int b = t; b < high + wide; b += kThreads) {
      Axis axis = rows;
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

template <class T, class R, int V>
__global__ void __launch_bounds__(kThreads, R::kForwardBlocks)
    roi_forward_kernel(const __grid_constant__ RoiForward<T, R> task) {
  using A = accumulate_t<T>;
  const R& r = task.regions;
  Tap<A>* const taps = dynamic_shared<Tap<A>>();
  int* const counts = reinterpret_cast<int*>(taps + (r.pooled_height + r.pooled_width) * kTaps);
  const int64_t roi = blockIdx.x, channel = int64_t(blockIdx.y) * kChannels, image = r.image_of(roi);
  const int level = r.level_of(roi);
  const RoiMapLevel& map = r.level[level];
  const Region<T, R> region{task,
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

// ---- on the host ----------------------------------------------------------------------------------------------------

template <class T, class R>
void pool_regions(const std::vector<Tensor>& inputs, const R& regions, const Tensor& output) {
  const Stream stream(output);
  RoiForward<T, R> task{regions, {}, mutable_data<T>(output), output.stride(0), output.stride(1), output.stride(3),
                        output.stride(1) == 1};
  constexpr int kVector = int(16 / sizeof(T));
  bool vectors = has_vectors(output, kVector);
  for (size_t i = 0; i < inputs.size(); ++i) {
    task.maps[i] = data<T>(inputs[i]);
    vectors &= has_vectors(inputs[i], kVector);
  }
  const int64_t bins = regions.pooled_height + regions.pooled_width;
  const size_t shared = size_t(bins) * (kTaps * sizeof(Tap<accumulate_t<T>>) + sizeof(int));
  STD_TORCH_CHECK(shared <= 96 << 10, "output_size: expected at most ", (96 << 10) / (shared / bins),
                  " bins along both axes together, got ", bins);
  const auto kernel = vectors ? roi_forward_kernel<T, R, kVector> : roi_forward_kernel<T, R, 1>;
  stream.launch(kernel, {output.size(0), ceil_div(inputs[0].size(1), kChannels)}, kThreads, shared, task);
}

}  // namespace fastcv::cuda
