// Tensor shells of roi_align_rotated: maps as channels-last, the taps of a bin, then its sums.
#include "../roi_align/roi_plan.h"
#include "roi_align_rotated.h"
#include "roi_align_rotated_tensors.h"

namespace fastcv {
namespace {

template <class C>
struct Regions {
  Tensor boxes;
  RotatedConstants c;
  int64_t height, width;  // of the map

  const C* row(int64_t k) const { return data<C>(boxes) + 6 * k; }
  RotatedRegion<C> operator[](int64_t k) const {
    return {row(k) + 1, C(c.scale), c.aligned, c.clockwise, c.pooled_height, c.pooled_width, c.sampling_ratio};
  }
  // f(bin, taps, n) for every bin of a region.
  template <class W, class F>
  void each_bin(int64_t k, std::vector<BilinearTap<W>>& taps, const F& f) const {
    const RotatedRegion<C> region = (*this)[k];
    const int64_t samples = height > 0 && width > 0 ? region.samples() : 0;
    for (int64_t bin = 0; bin < c.pooled_height * c.pooled_width; ++bin) {
      taps.clear();
      BilinearTap<W> tap;
      for (int64_t i = 0; i < samples; ++i)
        if (region.sample(bin / c.pooled_width, bin % c.pooled_width, i, height, width, &tap)) taps.push_back(tap);
      f(bin, taps.data(), int64_t(taps.size()));
    }
  }
};

// f(T{}, regions) with the type of the features; coordinates are double where boxes or features are.
template <class F>
void dispatch(ScalarType features, const Tensor& boxes, const RotatedConstants& c, int64_t height, int64_t width,
              const F& f) {
  check_rotated_regions(boxes, c, height, width);
  dispatch_floating(features, "input", [&](auto zero) {
    if (sizeof(zero) == 8 || boxes.scalar_type() == ScalarType::Double)
      f(zero, Regions<double>{as_contiguous(boxes, ScalarType::Double), c, height, width});
    else
      f(zero, Regions<float>{as_contiguous(boxes, ScalarType::Float), c, height, width});
  });
}

Tensor roi_align_rotated_cpu(const Tensor& input_any, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                             int64_t pooled_width, int64_t sampling_ratio, bool aligned, bool clockwise) {
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  const Tensor input = torch::stable::contiguous(input_any, MemoryFormat::ChannelsLast);
  const int64_t images = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  Tensor output = empty_cpu({boxes.size(0), channels, pooled_height, pooled_width}, input.scalar_type(),
                            MemoryFormat::ChannelsLast);
  const RotatedConstants c{spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise};
  dispatch(input.scalar_type(), boxes, c, height, width, [&](auto zero, const auto& regions) {
    using T = decltype(zero);
    const int64_t count = boxes.size(0), bins = pooled_height * pooled_width;
    std::vector<int64_t> image(size_t(count), 0);
    for (int64_t k = 0; k < count; ++k) image[size_t(k)] = roi_image(double(*regions.row(k)), k, images);
    parallel_dynamic(count, 4, [&](int64_t begin, int64_t end) {
      std::vector<BilinearTap<accumulate_t<T>>> taps;
      for (int64_t k = begin; k < end; ++k) {
        const T* const map = data<T>(input) + image[size_t(k)] * height * width * channels;
        T* const out = mutable_data<T>(output) + k * bins * channels;
        regions.each_bin(k, taps, [&](int64_t bin, const auto* taps, int64_t n) {
          FASTCV_PICK(sum_pixels<T>)(map, width, channels, taps, n, out + bin * channels);
        });
      }
    });
  });
  return is_channels_last(input_any) ? output : torch::stable::contiguous(output);
}

constexpr int64_t kChannels = 64;  // of a task

// A task owns some channels of one image and adds its regions in order: no two threads meet.
// grad: [K, PH, PW, C], map: [N, H, W, C].
template <class A, class R>
void backward(const A* grad, int64_t count, const R& regions, A* map, int64_t images, int64_t channels) {
  const int64_t blocks = (channels + kChannels - 1) / kChannels;
  const int64_t bins = regions.c.pooled_height * regions.c.pooled_width;
  const int64_t pixels = regions.height * regions.width;
  std::vector<std::vector<int64_t>> of_image(static_cast<size_t>(images));
  for (int64_t k = 0; k < count; ++k) of_image[size_t(roi_image(double(*regions.row(k)), k, images))].push_back(k);
  parallel_dynamic(images * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<BilinearTap<A>> taps;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t image = t / blocks, first = t % blocks * kChannels, some = std::min(kChannels, channels - first);
      A* const to = map + image * pixels * channels + first;
      for (int64_t i = 0; i < pixels; ++i) std::fill_n(to + i * channels, some, A(0));
      for (const int64_t k : of_image[size_t(image)])
        regions.each_bin(k, taps, [&](int64_t bin, const auto* found, int64_t n) {
          const A* const from = grad + (k * bins + bin) * channels + first;
          FASTCV_PICK(add_to_pixels<A>)(to, regions.width, channels, some, found, n, from);
        });
    }
  });
}

Tensor roi_align_rotated_backward_cpu(const Tensor& grad, const Tensor& boxes, double spatial_scale,
                                      int64_t pooled_height, int64_t pooled_width, int64_t batch_size,
                                      int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio,
                                      bool aligned, bool clockwise) {
  check_pooled(grad, "grad", boxes, channels, pooled_height, pooled_width);
  const bool wide = grad.scalar_type() == ScalarType::Double;
  const ScalarType sums = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor typed = grad.scalar_type() == sums ? grad : torch::stable::to(grad, sums);
  const Tensor from = torch::stable::contiguous(typed, MemoryFormat::ChannelsLast);
  const Tensor map = empty_cpu({batch_size, channels, height, width}, sums, MemoryFormat::ChannelsLast);
  const RotatedConstants c{spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise};
  dispatch(grad.scalar_type(), boxes, c, height, width, [&](auto zero, const auto& regions) {
    using A = accumulate_t<decltype(zero)>;
    backward(data<A>(from), from.size(0), regions, mutable_data<A>(map), batch_size, channels);
  });
  const Tensor result = grad.scalar_type() == sums ? map : torch::stable::to(map, grad.scalar_type());
  return is_channels_last(grad) ? result : torch::stable::contiguous(result);
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("roi_align_rotated", TORCH_BOX(&fastcv::roi_align_rotated_cpu));
  m.impl("roi_align_rotated_backward", TORCH_BOX(&fastcv::roi_align_rotated_backward_cpu));
}
