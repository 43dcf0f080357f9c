// Position-sensitive RoI pooling on the device: ps_roi_align and ps_roi_pool, which differ in their taps alone.
//
// A block of threads has a region and 256 outputs, a thread one of them, which reads an input channel of its own. The
// taps of all bins are made once for the block, by a thread each, in shared memory; where a bin has more than there
// is room for, its samples are taken in pieces, as many for all bins at once. Threads next to each other have outputs
// next to each other in memory: bins of a channel, or on channels-last maps channels of a bin.
//
// Bytes: each tap of each output is a load of its own, as no two outputs of a region share an element of the map. On
// contiguous maps the taps of a row lie in one or two sectors of 32 bytes; of a channels-last one each fetches a
// sector. Floor for R-FCN (300 regions, 21 classes, 7 x 7 bins, a map of 1029 channels x 38 x 63 in float32, about 16
// taps an output): the map 9.9 MB and the output 1.2 MB, 3 us at 4.3 TB/s. But 4.9 M loads of taps fetch 40 MB of
// sectors from the second-level cache on a contiguous map, and 160 MB on a channels-last one: ten times the map.
//
// A region whose batch index is no image gives NaN: to raise, as the CPU does, would wait for the device.
#include "ps_roi_align_cuda.h"

namespace fastcv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 16;           // of a bin along an axis, in shared memory
constexpr int kPitch = kTaps + 1;  // so that those of bins next to each other lie in other banks

template <class T, class R>
struct Forward {
  R regions;
  const T* map;
  T* output;  // [K, C, PH, PW]
  int64_t stride_roi, stride_c, stride_bin;
  bool by_channel;  // threads next to each other have channels next to each other
};

// The samples of one bin, and how they are divided into pieces whose taps there is room for.
template <class Axis>
struct BinSamples {
  const Axis& axis;
  int64_t p, size, first, last, step;

  __device__ BinSamples(const Axis& axis, int64_t p, int64_t size) : axis(axis), p(p), size(size) {
    axis.sample_range(p, size, &first, &last);
    constexpr int kMost = Axis::kMostTaps;
    step = kMost > 1 && axis.taps_per_bin(size) <= kTaps ? last - first : kTaps / kMost;
  }
  __device__ int pieces() const { return last > first ? int(ceil_div(last - first, step)) : 0; }

  // Makes the taps of one piece; returns their number.
  template <class A>
  __device__ int make(int piece, Tap<A>* taps) const {
    const int64_t begin = first + piece * step, end = begin + step < last ? begin + step : last;
    return begin < end ? int(append_samples(axis, p, size, begin, end, taps) - taps) : 0;
  }
};

// f(samples of bin b), where the bins of rows come before those of columns.
template <class R, class F>
__device__ void with_bin(const R& r, int64_t roi, int b, const F& f) {
  const RoiMapLevel& map = r.level[0];
  const bool vertical = b < r.pooled_height;
  auto axis = r.rows(roi, map);
  if (!vertical) axis = r.columns(roi, map);
  f(BinSamples(axis, vertical ? b : b - r.pooled_height, vertical ? map.height : map.width));
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, 3) ps_roi_align_forward_kernel(const __grid_constant__ Forward<T, R> task) {
  using A = accumulate_t<T>;
  __shared__ int pieces[2];
  const R& r = task.regions;
  const RoiMapLevel& map = r.level[0];
  const int high = int(r.pooled_height), wide = int(r.pooled_width), bins = high * wide, t = int(threadIdx.x);
  Tap<A>* const taps = dynamic_shared<Tap<A>>();
  int* const counts = reinterpret_cast<int*>(taps + (high + wide) * kPitch);
  const int channels = int(r.channels) / bins, item = int(blockIdx.y) * kThreads + t;
  const int inner = task.by_channel ? channels : bins, quotient = item / inner, rest = item - quotient * inner;
  const int c = task.by_channel ? rest : quotient, bin = task.by_channel ? quotient : rest;
  const int y = bin / wide, x = high + bin % wide;
  const bool here = item < r.channels;
  const int64_t roi = blockIdx.x, image = r.image_of(roi);
  const T* const features =
      task.map + (image < 0 ? 0 : image) * map.stride_n + (c * int64_t(bins) + bin) * map.stride_c;
  A sum = image < 0 ? A(NAN) : 0;

  if (t < 2) pieces[t] = 0;
  __syncthreads();
  for (int b = t; image >= 0 && b < high + wide; b += kThreads)
    with_bin(r, roi, b, [&](const auto& samples) { atomicMax(&pieces[b < high ? 0 : 1], samples.pieces()); });
  __syncthreads();
  for (int i = 0; i < pieces[0]; ++i)
    for (int j = 0; j < pieces[1]; ++j) {
      for (int b = t; b < high + wide; b += kThreads)
        with_bin(r, roi, b,
                 [&](const auto& samples) { counts[b] = samples.make(b < high ? i : j, taps + b * kPitch); });
      __syncthreads();
      for (int m = 0; here && m < counts[y]; ++m) {
        const Tap<A> row = taps[y * kPitch + m];
        for (int n = 0; n < counts[x]; ++n) {
          const Tap<A> column = taps[x * kPitch + n];
          sum += row.weight * column.weight * load(features + row.index * map.stride_y + column.index * map.stride_x);
        }
      }
      __syncthreads();
    }
  if (here) store(task.output + roi * task.stride_roi + c * task.stride_c + bin * task.stride_bin, sum);
}

// ---- shells ---------------------------------------------------------------------------------------------------------

Tensor run_forward(const Tensor& input, const Tensor& boxes, const PsConstants& c) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(2) < INT32_MAX && input.size(3) < INT32_MAX,
                  "input: expected shape [N, C * PH * PW, H, W]");
  check_ps_regions(boxes, c, input.size(1));
  const int64_t bins = c.pooled_height * c.pooled_width;
  STD_TORCH_CHECK(input.size(1) % bins == 0, "input: expected a multiple of ", bins, " channels, got ", input.size(1));
  const Tensor output = empty_on(input, {boxes.size(0), input.size(1) / bins, c.pooled_height, c.pooled_width},
                                 input.scalar_type(), memory_format(input));
  const Stream stream(input);
  dispatch_ps_regions(input, boxes, c, [&](auto feature, const auto& regions) {
    using T = decltype(feature);
    using R = std::decay_t<decltype(regions)>;
    const Forward<T, R> task{regions,          data<T>(input),   mutable_data<T>(output), output.stride(0),
                             output.stride(1), output.stride(3), output.stride(1) == 1};
    const size_t each = kPitch * sizeof(Tap<accumulate_t<T>>) + sizeof(int), shared = size_t(c.axis_bins()) * each;
    STD_TORCH_CHECK(shared <= 96 << 10, "output_size: expected at most ", (96 << 10) / each,
                    " bins along both axes together, got ", c.axis_bins());
    stream.launch(ps_roi_align_forward_kernel<T, R>, {boxes.size(0), ceil_div(input.size(1), kThreads)}, kThreads,
                  shared, task);
  });
  return output;
}

Tensor ps_roi_align_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                         int64_t pooled_width, int64_t sampling_ratio) {
  return run_forward(input, boxes, {false, spatial_scale, pooled_height, pooled_width, sampling_ratio});
}

Tensor ps_roi_pool_cuda(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                        int64_t pooled_width) {
  return run_forward(input, boxes, {true, spatial_scale, pooled_height, pooled_width, 0});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("ps_roi_align", TORCH_BOX(&fastcv::cuda::ps_roi_align_cuda));
  m.impl("ps_roi_pool", TORCH_BOX(&fastcv::cuda::ps_roi_pool_cuda));
}
