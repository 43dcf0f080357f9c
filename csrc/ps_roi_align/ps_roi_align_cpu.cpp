// Tensor shells of ps_roi_align and ps_roi_pool, which differ in their taps alone.
#include "ps_roi_align.h"

#include "../roi_align/roi_plan.h"
#include "../roi_align/roi_tensors.h"

namespace fastcv {
namespace {

// Packing a map pays where its pixels are read more often than this, on average; measured.
constexpr double kReadsToPack = 0.5, kAddsToPack = 2;

template <class T>
void forward(const PsRoiAlignForward<T>& task, const RoiPlan<accumulate_t<T>>& plan) {
  using A = accumulate_t<T>;
  const int64_t count = int64_t(plan.rois.size()), bins = task.bins(), pixels = task.map.height * task.map.width;
  const int64_t lanes = FASTCV_PICK(ps_roi_align_block_channels<T>)(), blocks = (task.channels + lanes - 1) / lanes;
  // Of a channels-last map a bin's channels come with all others of their pixels: packing bin by bin would read it all
  // for every bin.
  if (task.map.stride_c == 1 || double(plan.total_taps) < kReadsToPack * double(pixels * bins * task.map.images)) {
    parallel_dynamic(count, 4, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch = allocate_scratch<A>(bins * lanes);
      FASTCV_PICK(ps_roi_align_in_place<T>)(task, begin, end, scratch.get());
    });
    return;
  }
  for (int64_t image = 0; image < task.map.images; ++image) {
    const int64_t first = plan.group[image], last = plan.group[image + 1];
    if (first == last) continue;
    for (int64_t block = 0; block < blocks; ++block) {
      const Scratch<A> tiles = allocate_scratch<A>((last - first) * bins * lanes);
      parallel_dynamic(bins, 1, [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch = allocate_scratch<A>(pixels * lanes);
        for (int64_t bin = begin; bin < end; ++bin)
          FASTCV_PICK(ps_roi_align_packed<T>)(task, first, last, bin, block * lanes, scratch.get(), tiles.get());
      });
      parallel_for(last - first, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          FASTCV_PICK(ps_roi_align_unpack<T>)(task, first + i, block * lanes, tiles.get() + i * bins * lanes);
      });
    }
  }
}

// A task owns the channels of one bin and adds its regions in order: no two threads meet.
template <class T>
void backward_in_place(const PsRoiAlignBackward<T>& task, const RoiPlan<T>& plan) {
  const int64_t elements = task.map.images * task.map.channels * task.map.height * task.map.width;
  parallel_for(elements, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(task.map.data + begin, task.map.data + end, T(0));
  });
  const int64_t adds = plan.total_taps * task.channels / task.bins();
  parallel_for(task.bins(), 1 + (1 << 13) / (1 + adds), [&](int64_t begin, int64_t end) {
    for (int64_t bin = begin; bin < end; ++bin)
      FASTCV_PICK(ps_roi_align_backward_in_place<T>)(task, 0, int64_t(plan.rois.size()), bin);
  });
}

template <class T>
void backward(const PsRoiAlignBackward<T>& task, const RoiPlan<accumulate_t<T>>& plan) {
  using A = accumulate_t<T>;
  const int64_t bins = task.bins(), pixels = task.map.height * task.map.width;
  const int64_t lanes = FASTCV_PICK(ps_roi_align_block_channels<T>)(), blocks = (task.channels + lanes - 1) / lanes;
  if constexpr (std::is_same_v<T, A>) {
    if (double(plan.total_taps) < kAddsToPack * double(pixels * bins * task.map.images))
      return backward_in_place(task, plan);
  }
  // Tasks of neighbouring bins go to one thread, for in a channels-last map they share cache lines.
  parallel_for(task.map.images * blocks * bins, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>(pixels * lanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t bin = t % bins, channel = t / bins % blocks * lanes, image = t / bins / blocks;
      FASTCV_PICK(ps_roi_align_backward_packed<T>)(task, image, plan.group[image], plan.group[image + 1], bin, channel,
                                                   scratch.get());
    }
  });
}

// plan(W{}, geometry) gives the regions with their taps.
template <class MakePlan>
Tensor run_forward(const Tensor& input, const Tensor& boxes, double scale, int64_t pooled_height, int64_t pooled_width,
                   const MakePlan& make_plan) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C * PH * PW, H, W]");
  const int64_t bins = pooled_height * pooled_width;
  STD_TORCH_CHECK(bins > 0 && input.size(1) % bins == 0, "input: expected a multiple of ", bins, " channels, got ",
                  input.size(1));
  const int64_t channels = input.size(1) / bins;
  Tensor output = empty_cpu({boxes.size(0), channels, pooled_height, pooled_width}, input.scalar_type(),
                            memory_format(input));
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const RoiGeometry g{{{input.size(2), input.size(3), scale}}, input.size(0), pooled_height, pooled_width};
    const RoiPlan<accumulate_t<T>> plan = make_plan(accumulate_t<T>{}, g);
    if (output.numel() == 0) return;
    forward(PsRoiAlignForward<T>{feature_map<const T>(input), plan.rois.data(), channels, pooled_height, pooled_width,
                                 mutable_data<T>(output), output.stride(0), output.stride(1), output.stride(3)},
            plan);
  });
  return output;
}

template <class MakePlan>
Tensor run_backward(const Tensor& grad_any, const Tensor& boxes, double scale, int64_t pooled_height,
                    int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height, int64_t width,
                    const MakePlan& make_plan) {
  const int64_t bins = pooled_height * pooled_width;
  STD_TORCH_CHECK(grad_any.dim() == 4 && grad_any.size(0) == boxes.size(0) && bins > 0 &&
                      grad_any.size(1) * bins == channels && grad_any.size(2) == pooled_height &&
                      grad_any.size(3) == pooled_width,
                  "grad: expected shape [", boxes.size(0), ", ", channels, " / ", bins, ", ", pooled_height, ", ",
                  pooled_width, "]");
  const Tensor grad = with_one_bin_stride(grad_any);
  Tensor grad_input = empty_cpu({batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const RoiGeometry g{{{height, width, scale}}, batch_size, pooled_height, pooled_width};
    const RoiPlan<accumulate_t<T>> plan = make_plan(accumulate_t<T>{}, g);
    if (grad_input.numel() == 0) return;
    backward(PsRoiAlignBackward<T>{feature_map<T>(grad_input), plan.rois.data(), grad.size(1), pooled_height,
                                   pooled_width, data<T>(grad), grad.stride(0), grad.stride(1), grad.stride(3)},
             plan);
  });
  return grad_input;
}

// RoIAlign's taps, half a pixel shifted and regions never widened.
auto bilinear(const Tensor& boxes, int64_t sampling_ratio) {
  return [&boxes, sampling_ratio]<class W>(W, RoiGeometry g) {
    g.offset = 0.5, g.sampling_ratio = sampling_ratio;
    return plan_rois<W>(boxes, g);
  };
}
auto mean(const Tensor& boxes) {
  return [&boxes]<class W>(W, const RoiGeometry& g) {
    return plan_rois<W>(boxes, g, []<class C>(C low, C high, C scale, int64_t bins, bool) {
      return MeanAxis<C>(low, high, scale, bins);
    });
  };
}

Tensor ps_roi_align_cpu(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                        int64_t pooled_width, int64_t sampling_ratio) {
  return run_forward(input, boxes, spatial_scale, pooled_height, pooled_width, bilinear(boxes, sampling_ratio));
}

Tensor ps_roi_align_backward_cpu(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                                 int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                                 int64_t width, int64_t sampling_ratio) {
  return run_backward(grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
                      bilinear(boxes, sampling_ratio));
}

Tensor ps_roi_pool_cpu(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                       int64_t pooled_width) {
  return run_forward(input, boxes, spatial_scale, pooled_height, pooled_width, mean(boxes));
}

Tensor ps_roi_pool_backward_cpu(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                                int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                                int64_t width) {
  return run_backward(grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
                      mean(boxes));
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("ps_roi_align", TORCH_BOX(&fastcv::ps_roi_align_cpu));
  m.impl("ps_roi_align_backward", TORCH_BOX(&fastcv::ps_roi_align_backward_cpu));
  m.impl("ps_roi_pool", TORCH_BOX(&fastcv::ps_roi_pool_cpu));
  m.impl("ps_roi_pool_backward", TORCH_BOX(&fastcv::ps_roi_pool_backward_cpu));
}
