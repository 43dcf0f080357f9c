// Tensor shells of roi_pool and its gradient.
#include "roi_pool.h"

#include "../common/radix_sort.h"
#include "../common/stable.h"
#include "../roi_align/roi_plan.h"

namespace fastcv {
namespace {

struct PoolPlan {
  std::vector<PoolRegion> regions;  // by image, then place
  std::vector<int64_t> image_begin;  // [N + 1]
  std::vector<PixelRange> ranges;
};

template <class C>
PoolPlan plan_typed(const Tensor& boxes, double scale, int64_t images, int64_t pooled_height, int64_t pooled_width,
                    int64_t height, int64_t width) {
  const int64_t count = boxes.size(0), per_region = pooled_height + pooled_width;
  STD_TORCH_CHECK(count < std::numeric_limits<int32_t>::max(), "boxes: expected fewer than 2^31 regions, got ", count);
  const C* rois = data<C>(boxes);
  PoolPlan plan;
  plan.image_begin.assign(images + 1, 0);
  std::vector<Keyed<uint64_t>> order(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t image = roi_image(double(rois[5 * k]), k, images);
    order[k] = {uint64_t(image) << 24 | place_key(rois + 5 * k, scale), int32_t(k)};
    ++plan.image_begin[image + 1];
  }
  for (int64_t i = 0; i < images; ++i) plan.image_begin[i + 1] += plan.image_begin[i];
  radix_sort(order);
  plan.ranges.resize(count * per_region);
  plan.regions.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const C* roi = rois + 5 * order[i].row;
    PixelRange* rows = plan.ranges.data() + i * per_region;
    pool_ranges(roi[2], roi[4], C(scale), pooled_height, height, rows);
    pool_ranges(roi[1], roi[3], C(scale), pooled_width, width, rows + pooled_height);
    plan.regions[i] = {rows, rows + pooled_height, order[i].row, int32_t(roi[0])};
  }
  return plan;
}

// Coordinates are double where the regions or the features are, float otherwise.
PoolPlan plan(const Tensor& boxes, ScalarType features, double scale, int64_t images, int64_t pooled_height,
              int64_t pooled_width, int64_t height, int64_t width) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes: expected shape [K, 5]");
  STD_TORCH_CHECK(pooled_height > 0 && pooled_width > 0, "output_size: expected at least 1 x 1, got ", pooled_height,
                  " x ", pooled_width);
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height * width < std::numeric_limits<int32_t>::max(),
                  "input: expected fewer than 2^31 pixels per channel, got ", height, " x ", width);
  if (boxes.scalar_type() == ScalarType::Double || features == ScalarType::Double)
    return plan_typed<double>(as_contiguous(boxes, ScalarType::Double), scale, images, pooled_height, pooled_width,
                              height, width);
  return plan_typed<float>(as_contiguous(boxes, ScalarType::Float), scale, images, pooled_height, pooled_width, height,
                           width);
}

// Rows of the map that a region reads.
PixelRange row_span(const PoolRegion& region, int64_t pooled_height) {
  PixelRange span{std::numeric_limits<int32_t>::max(), 0};
  for (int64_t p = 0; p < pooled_height; ++p) {
    if (region.rows[p].begin >= region.rows[p].end) continue;
    span = {std::min(span.begin, region.rows[p].begin), std::max(span.end, region.rows[p].end)};
  }
  return span.begin < span.end ? span : PixelRange{0, 0};
}

template <class T>
void forward(const RoiPoolForward<T>& task, const PoolPlan& plan) {
  using A = accumulate_t<T>;
  const int64_t count = int64_t(plan.regions.size()), bins = task.pooled_height * task.pooled_width;
  if (task.map.stride_c == 1 && task.stride_c == 1) {
    parallel_dynamic(count, 4, [&](int64_t begin, int64_t end) {
      FASTCV_PICK(roi_pool_channels_last<T>)(task, begin, end);
    });
    return;
  }
  const int64_t lanes = FASTCV_PICK(roi_pool_block_channels<T>)(), blocks = (task.map.channels + lanes - 1) / lanes;
  for (size_t image = 0; image + 1 < plan.image_begin.size(); ++image) {
    const int64_t first = plan.image_begin[image], last = plan.image_begin[image + 1];
    PixelRange all{0, 0};
    int64_t rows = 0;
    for (int64_t i = first; i < last; ++i) {
      const PixelRange span = row_span(plan.regions[i], task.pooled_height);
      rows += span.end - span.begin;
      all = all.begin == all.end ? span : PixelRange{std::min(all.begin, span.begin), std::max(all.end, span.end)};
    }
    // Few regions pack the rows of each by itself, many share the rows of all.
    const bool together = rows > all.end - all.begin;
    const int64_t groups = last == first ? 0 : together ? 1 : last - first;
    parallel_dynamic(groups * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch = allocate_scratch<A>(((all.end - all.begin) * task.map.width + 2 * bins) * lanes);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = first + t / blocks;
        const PixelRange span = together ? all : row_span(plan.regions[i], task.pooled_height);
        FASTCV_PICK(roi_pool_packed<T>)(task, i, together ? last : i + 1, t % blocks * lanes, span.begin, span.end,
                                        scratch.get());
      }
    });
  }
}

std::tuple<Tensor, Tensor> roi_pool_cpu(const Tensor& input, const Tensor& boxes, double spatial_scale,
                                        int64_t pooled_height, int64_t pooled_width) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const PoolPlan pool = plan(boxes, input.scalar_type(), spatial_scale, input.size(0), pooled_height, pooled_width,
                             input.size(2), input.size(3));
  const MemoryFormat format = memory_format(input);
  const auto size = {boxes.size(0), input.size(1), pooled_height, pooled_width};
  Tensor output = empty_cpu(size, input.scalar_type(), format), argmax = empty_cpu(size, ScalarType::Int, format);
  if (output.numel() == 0) return {output, argmax};
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    forward(RoiPoolForward<T>{feature_map<const T>(input), pool.regions.data(), pooled_height, pooled_width,
                              mutable_data<T>(output), mutable_data<int32_t>(argmax), output.stride(0),
                              output.stride(1), output.stride(3)},
            pool);
  });
  return {output, argmax};
}

// The kernel walks over bins with one stride.
Tensor with_one_bin_stride(const Tensor& t) {
  return t.stride(2) == t.stride(3) * t.size(3) ? t : torch::stable::contiguous(t);
}

Tensor roi_pool_backward_cpu(const Tensor& grad_any, const Tensor& boxes, const Tensor& argmax_any, double spatial_scale,
                             int64_t pooled_height, int64_t pooled_width, int64_t batch_size, int64_t channels,
                             int64_t height, int64_t width) {
  for (const Tensor* t : {&grad_any, &argmax_any})
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == boxes.size(0) && t->size(1) == channels &&
                        t->size(2) == pooled_height && t->size(3) == pooled_width,
                    "grad, argmax: expected shape [", boxes.size(0), ", ", channels, ", ", pooled_height, ", ",
                    pooled_width, "]");
  STD_TORCH_CHECK(argmax_any.scalar_type() == ScalarType::Int, "argmax: expected int32");
  const PoolPlan pool =
      plan(boxes, grad_any.scalar_type(), spatial_scale, batch_size, pooled_height, pooled_width, height, width);
  const Tensor grad = with_one_bin_stride(grad_any), argmax = with_one_bin_stride(argmax_any);
  Tensor grad_input = empty_cpu({batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  if (grad_input.numel() == 0) return grad_input;
  std::atomic<bool> valid{true};
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const RoiPoolBackward<T> task{feature_map<T>(grad_input), pool.regions.data(), pooled_height * pooled_width,
                                  data<T>(grad), grad.stride(0), grad.stride(1), grad.stride(3), data<int32_t>(argmax),
                                  argmax.stride(0), argmax.stride(1), argmax.stride(3)};
    const int64_t lanes = FASTCV_PICK(roi_pool_block_channels<T>)(), blocks = (channels + lanes - 1) / lanes;
    // A task owns a block of channels of one image and adds its regions in order: no two threads meet.
    parallel_dynamic(batch_size * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch = allocate_scratch<A>(height * width * lanes);
      for (int64_t t = begin; t < end; ++t)
        if (!FASTCV_PICK(roi_pool_backward_block<T>)(task, t / blocks, pool.image_begin[t / blocks],
                                                     pool.image_begin[t / blocks + 1], t % blocks * lanes,
                                                     scratch.get()))
          valid = false;
    });
  });
  STD_TORCH_CHECK(valid, "argmax: expected positions from -1 to ", height * width - 1);
  return grad_input;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("roi_pool", TORCH_BOX(&fastcv::roi_pool_cpu));
  m.impl("roi_pool_backward", TORCH_BOX(&fastcv::roi_pool_backward_cpu));
}
