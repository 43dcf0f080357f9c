// Tensor shells of roi_pool and its gradient.
#include "roi_pool.h"

#include "../common/radix_sort.h"
#include "../roi_align/roi_plan.h"
#include "../roi_align/roi_tensors.h"

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
      const Scratch<A> scratch = allocate_scratch<A>(((all.end - all.begin) * task.map.width + 3 * bins) * lanes);
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
                              output.stride(1), output.stride(3),
                              output.stride(1) == pooled_height * pooled_width &&
                                  exceeds_caches<T>(output)},
            pool);
  });
  return {output, argmax};
}

// Bounds of bands of rows with about the same work in each: bins that are added and pixels that are cleared.
template <class T>
std::vector<int64_t> balanced_rows(const RoiPoolBackward<T>& task, int64_t first, int64_t last, int64_t bands) {
  constexpr int64_t pixels_as_a_bin = 16;
  std::vector<int64_t> work(task.map.height, 1 + task.map.width / pixels_as_a_bin);
  for (int64_t i = first; i < last; ++i)
    for (int64_t p = 0; p < task.pooled_height; ++p) {
      const PixelRange rows = task.regions[i].rows[p];
      if (rows.begin < rows.end) work[(rows.begin + rows.end) / 2] += task.pooled_width;
    }
  int64_t total = 0, sum = 0;
  for (int64_t w : work) total += w;
  std::vector<int64_t> bounds{0};
  for (int64_t y = 0; y < task.map.height; ++y) {
    sum += work[y];
    while (int64_t(bounds.size()) < bands && sum * bands >= total * int64_t(bounds.size())) bounds.push_back(y + 1);
  }
  bounds.resize(bands, task.map.height);
  bounds.push_back(task.map.height);
  return bounds;
}

constexpr int64_t kPlaneBytes = 1 << 19;    // planes that are added to at once: half of a second-level cache
constexpr int64_t kScratchBytes = 1 << 22;  // of a band in a type that is too coarse to add in

// A task owns planes or rows of one image and adds its regions in order: no two threads meet.
template <class T>
bool backward(const RoiPoolBackward<T>& task, const PoolPlan& plan) {
  using A = accumulate_t<T>;
  const FeatureMap<T>& map = task.map;
  const bool channels_last = map.stride_c == 1, in_place = std::is_same_v<T, A>;
  const int64_t plane_bytes = map.height * map.width * int64_t(sizeof(A)), image_bytes = plane_bytes * map.channels;
  int64_t parts, most = 0;
  std::vector<std::vector<int64_t>> bounds(map.images);
  if (channels_last) {
    parts = (torch::stable::get_num_threads() + map.images - 1) / map.images;
    if (!in_place) parts = std::max(parts, image_bytes / kScratchBytes);
    parts = std::min(parts, map.height);
    for (int64_t n = 0; n < map.images; ++n)
      bounds[n] = balanced_rows(task, plan.image_begin[n], plan.image_begin[n + 1], parts);
  } else {
    const int64_t planes = std::clamp<int64_t>(kPlaneBytes / plane_bytes, 1, map.channels);
    parts = (map.channels + planes - 1) / planes;
    for (int64_t c = 0; c <= parts; ++c) bounds[0].push_back(std::min(c * planes, map.channels));
    std::fill(bounds.begin() + 1, bounds.end(), bounds[0]);
  }
  for (const std::vector<int64_t>& b : bounds)
    for (int64_t part = 0; part < parts; ++part) most = std::max(most, b[part + 1] - b[part]);
  const int64_t unit = channels_last ? map.width * map.channels : map.height * map.width;
  std::atomic<bool> valid{true};
  parallel_dynamic(map.images * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch;
    if (!in_place) scratch = allocate_scratch<A>(most * unit);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / parts, first = bounds[n][t % parts], last = bounds[n][t % parts + 1];
      const auto kernel =
          channels_last ? FASTCV_PICK(roi_pool_backward_rows<T>) : FASTCV_PICK(roi_pool_backward_planes<T>);
      if (!kernel(task, n, plan.image_begin[n], plan.image_begin[n + 1], first, last, scratch.get())) valid = false;
    }
  });
  return valid;
}

Tensor roi_pool_backward_cpu(const Tensor& grad_any, const Tensor& boxes, const Tensor& argmax_any,
                             double spatial_scale, int64_t pooled_height, int64_t pooled_width, int64_t batch_size,
                             int64_t channels, int64_t height, int64_t width) {
  check_pooled(grad_any, "grad", boxes, channels, pooled_height, pooled_width);
  check_pooled(argmax_any, "argmax", boxes, channels, pooled_height, pooled_width);
  STD_TORCH_CHECK(argmax_any.scalar_type() == ScalarType::Int, "argmax: expected int32");
  const PoolPlan pool =
      plan(boxes, grad_any.scalar_type(), spatial_scale, batch_size, pooled_height, pooled_width, height, width);
  const Tensor grad = with_one_bin_stride(grad_any), argmax = with_one_bin_stride(argmax_any);
  Tensor grad_input = empty_cpu({batch_size, channels, height, width}, grad.scalar_type(), memory_format(grad_any));
  if (grad_input.numel() == 0) return grad_input;
  bool valid = true;
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    valid = backward(RoiPoolBackward<T>{feature_map<T>(grad_input), pool.regions.data(), pooled_height, pooled_width,
                                        data<T>(grad), grad.stride(0), grad.stride(1), grad.stride(3),
                                        data<int32_t>(argmax), argmax.stride(0), argmax.stride(1), argmax.stride(3)},
                     pool);
  });
  STD_TORCH_CHECK(valid, "argmax: expected -1 or positions in the rows of their bins");
  return grad_input;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("roi_pool", TORCH_BOX(&fastcv::roi_pool_cpu));
  m.impl("roi_pool_backward", TORCH_BOX(&fastcv::roi_pool_backward_cpu));
}
