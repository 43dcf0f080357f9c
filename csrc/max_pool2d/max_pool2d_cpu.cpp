// Tensor shells of max pooling, unpooling and their gradients.
#include "max_pool2d.h"

#include "../common/pool_shell.h"

namespace fastcv {
namespace {

constexpr int64_t kCompactTaps = 255;

// Every window needs a pixel: one without has no maximum. Only dilated windows can step over a small map.
void check_windows(const PoolAxis& a) {
  for (int64_t o = 0; o < a.output; ++o) {
    const int64_t start = a.start(o), first = start < 0 ? (a.dilation - 1 - start) / a.dilation : 0;
    STD_TORCH_CHECK(first < a.kernel && start + first * a.dilation < a.input,
                    "dilation: window ", o, " has no pixel of the input of ", a.input, " pixels");
  }
}

std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& input_any, FASTCV_WINDOW_PARAMETERS, bool ceil_mode,
                                          int64_t index_bytes) {
  const Window window FASTCV_WINDOW;
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  STD_TORCH_CHECK(index_bytes == 0 || index_bytes == 1 || index_bytes == 8, "index_bytes: expected 0, 1 or 8, got ",
                  index_bytes);
  const MemoryFormat format = memory_format(input_any);
  const Tensor input = with_vectors(input_any, format);
  PoolGeometry g = pool_geometry(window, input.size(2), input.size(3));
  g.y.output = pooled_size(g.y, ceil_mode), g.x.output = pooled_size(g.x, ceil_mode);
  check_windows(g.y), check_windows(g.x);
  STD_TORCH_CHECK(index_bytes != 1 || g.y.kernel * g.x.kernel <= kCompactTaps,
                  "indices: compact ones serve windows of up to 255 elements, got ", g.y.kernel, " x ", g.x.kernel);
  const int64_t images = input.size(0), channels = input.size(1);
  Tensor output = empty_cpu({images, channels, g.y.output, g.x.output}, input.scalar_type(), format);
  Tensor indices = index_bytes == 0 ? empty_cpu({0}, ScalarType::Byte)
                                    : empty_cpu({images, channels, g.y.output, g.x.output},
                                                index_bytes == 1 ? ScalarType::Byte : ScalarType::Long, format);
  if (output.numel() == 0) return {output, indices};
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const MaxPool<T> task{g, feature_map<const T>(input), mutable_data<T>(output),
                          index_bytes == 1 ? mutable_data<uint8_t>(indices) : nullptr,
                          index_bytes == 8 ? mutable_data<int64_t>(indices) : nullptr,
                          exceeds_caches<T>(output)};
    if (format == MemoryFormat::ChannelsLast)
      parallel_for(images * g.y.output, pool_grain(g.x.output * channels), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(max_pool2d_channels_last<T>)(task, begin, end);
      });
    else
      parallel_for(images * channels * g.y.output, pool_grain(g.x.output), [&](int64_t begin, int64_t end) {
        FASTCV_PICK(max_pool2d_contiguous<T>)(task, begin, end);
      });
  });
  return {output, indices};
}

PlaneStrides plane_strides(MemoryFormat format, int64_t channels, int64_t pixels) {
  return format == MemoryFormat::ChannelsLast ? PlaneStrides{channels * pixels, 1, channels}
                                              : PlaneStrides{channels * pixels, pixels, 1};
}

template <class T>
struct Unpooling {
  MaxUnpool<T> task;
  MemoryFormat format;

  int64_t windows() const { return task.images * task.channels * task.geometry.y.output * task.geometry.x.output; }

  // Row by row; how many windows were found to point at a pixel of theirs.
  template <class Kernel>
  static int64_t rows(const Kernel& kernel, const MaxUnpool<T>& t, int64_t count, int64_t elements) {
    std::atomic<int64_t> found{0};
    parallel_for(count, pool_grain(elements), [&](int64_t begin, int64_t end) { found += kernel(t, begin, end); });
    return found;
  }

  // By the indices one by one; raises where one of them points outside.
  template <class S, class Kernel>
  void anywhere(const Kernel& kernel, bool scratch) const {
    const PoolGeometry& g = task.geometry;
    const int64_t pixels = g.y.input * g.x.input, count = g.y.output * g.x.output, planes = task.images * task.channels;
    const PlaneStrides map = plane_strides(format, task.channels, pixels),
                       windows = plane_strides(format, task.channels, count);
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> bad{kNone};
    parallel_for(planes, pool_grain(std::max(count, pixels)), [&](int64_t begin, int64_t end) {
      const Scratch<S> own = scratch ? allocate_scratch<S>(size_t(pixels)) : Scratch<S>();
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t at = kernel(task, map, windows, plane / task.channels, plane % task.channels, own.get());
        int64_t first = bad.load();
        while (at >= 0 && plane * count + at < first && !bad.compare_exchange_weak(first, plane * count + at)) {
        }
      }
    });
    if (bad == kNone) return;
    const int64_t image = bad / count / task.channels, c = bad / count % task.channels, p = bad % count;
    const int64_t element = image * windows.image + c * windows.channel + p * windows.pixel;
    if (task.flat)
      STD_TORCH_CHECK(false, "indices: expected 0 to ", pixels - 1, ", got ", task.flat[element], " at [", image, ", ",
                      c, ", ", p / g.x.output, ", ", p % g.x.output, "]");
    STD_TORCH_CHECK(false, "indices: expected elements of their windows inside the map of ", g.y.input, " x ",
                    g.x.input, ", got ", int(task.compact[element]), " at [", image, ", ", c, ", ", p / g.x.output,
                    ", ", p % g.x.output, "]");
  }

  // Into a channels-last map, a block of channels at a time; false where an index points outside or a block is large.
  bool add_blocks() const {
    using A = accumulate_t<T>;
    constexpr int64_t kChannels = 64, kMostScratch = int64_t(1) << 20;
    const int64_t pixels = task.geometry.y.input * task.geometry.x.input;
    const bool whole = task.images >= 2 * torch::stable::get_num_threads() && pixels * task.channels <= kMostScratch;
    const int64_t most = whole ? task.channels : kChannels, blocks = (task.channels + most - 1) / most;
    if (pixels * most > kMostScratch) return false;
    std::atomic<bool> inside{true};
    parallel_for(task.images * blocks, pool_grain(pixels * most), [&](int64_t begin, int64_t end) {
      const Scratch<A> sums = allocate_scratch<A>(sizeof(T) == sizeof(A) ? 0 : size_t(pixels * most));
      for (int64_t i = begin; i < end && inside; ++i) {
        const int64_t c = i % blocks * most, n = std::min(most, task.channels - c);
        if (!FASTCV_PICK(max_unpool2d_add_block<T>)(task, i / blocks, c, n, sums.get())) inside = false;
      }
    });
    return inside;
  }

  void scatter(bool anywhere_at_once) const {
    const PoolGeometry& g = task.geometry;
    if (anywhere_at_once && task.sum && format == MemoryFormat::ChannelsLast && add_blocks()) return;
    if (!anywhere_at_once) {
      MaxUnpool<T> t = task;
      const bool channels_last = format == MemoryFormat::ChannelsLast;
      const CoveringLists above = windows_by_pixel(g.y),
                          beside = channels_last ? windows_by_pixel(g.x) : windows_by_phase(g.x);
      t.rows = above.view(), t.columns = beside.view();
      const int64_t found = channels_last
          ? rows(FASTCV_PICK(max_unpool2d_channels_last<T>), t, t.images * g.y.input, g.x.input * t.channels)
          : rows(FASTCV_PICK(max_unpool2d_contiguous<T>), t, t.images * t.channels * g.y.input, g.x.input);
      if (found == windows()) return;
    }
    anywhere<accumulate_t<T>>(FASTCV_PICK(max_unpool2d_anywhere<T>), task.sum);
  }

  void gather() const {
    constexpr int64_t kVectorTaps = 49;  // in larger windows it is quicker to look up each index
    const PoolGeometry& g = task.geometry;
    if ((g.disjoint() || (task.sum && task.compact)) && g.y.kernel * g.x.kernel <= kVectorTaps) {
      const int64_t found = format == MemoryFormat::ChannelsLast
                                ? rows(FASTCV_PICK(max_unpool2d_gather_channels_last<T>), task,
                                       task.images * g.y.output, g.x.output * task.channels)
                                : rows(FASTCV_PICK(max_unpool2d_gather_contiguous<T>), task,
                                       task.images * task.channels * g.y.output, g.x.output);
      if (found == windows()) return;
    }
    anywhere<int32_t>(FASTCV_PICK(max_unpool2d_gather_anywhere<T>), !task.sum && !(task.compact && g.disjoint()));
  }
};

// Runs f(Unpooling<T>) from one tensor to a new one of the other size.
template <class F>
Tensor between(const Tensor& from_any, const Tensor& indices_any, int64_t height, int64_t width, const Window& window,
               bool to_map, bool sum, const F& f) {
  STD_TORCH_CHECK(from_any.dim() == 4 && indices_any.dim() == 4, "input, indices: expected shape [N, C, H, W]");
  const bool compact = indices_any.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(compact || indices_any.scalar_type() == ScalarType::Long, "indices: expected uint8 or int64");
  STD_TORCH_CHECK(from_any.size(0) == indices_any.size(0) && from_any.size(1) == indices_any.size(1),
                  "indices: expected the images and channels of the input");
  PoolGeometry g = pool_geometry(window, height, width);
  g.y.output = indices_any.size(2), g.x.output = indices_any.size(3);
  for (const PoolAxis* a : {&g.y, &g.x})
    STD_TORCH_CHECK(a->output <= (int64_t(1) << 40) / a->stride, "indices: too many for a stride of ", a->stride);
  STD_TORCH_CHECK(g.y.output == 0 || g.x.output <= std::numeric_limits<int32_t>::max() / g.y.output,
                  "indices: expected fewer than 2^31 per channel");
  STD_TORCH_CHECK(to_map ? from_any.size(2) == g.y.output && from_any.size(3) == g.x.output
                         : from_any.size(2) == height && from_any.size(3) == width,
                  "input: expected the size of the ", to_map ? "indices" : "map");
  const MemoryFormat format = memory_format(from_any);
  const Tensor from = dense(from_any, format), indices = dense(indices_any, format);
  Tensor to = to_map ? empty_cpu({from.size(0), from.size(1), height, width}, from.scalar_type(), format)
                     : empty_cpu({from.size(0), from.size(1), g.y.output, g.x.output}, from.scalar_type(), format);
  if (to.numel() == 0) return to;
  dispatch_floating(from.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    f(Unpooling<T>{{g, from.size(0), from.size(1), data<T>(from), mutable_data<T>(to),
                    compact ? data<uint8_t>(indices) : nullptr, compact ? nullptr : data<int64_t>(indices), {}, {}, sum,
                    exceeds_caches<T>(to)},
                   format});
  });
  return to;
}

Tensor max_unpool2d_cpu(const Tensor& input, const Tensor& indices, int64_t height, int64_t width,
                        FASTCV_WINDOW_PARAMETERS, bool sum) {
  const Window window FASTCV_WINDOW;
  const bool anywhere = indices.scalar_type() == ScalarType::Long && kernel_h == 1 && kernel_w == 1;
  return between(input, indices, height, width, window, true, sum, [&](const auto& u) { u.scatter(anywhere); });
}

Tensor max_unpool2d_backward_cpu(const Tensor& grad, const Tensor& indices, FASTCV_WINDOW_PARAMETERS, bool sum) {
  const Window window FASTCV_WINDOW;
  STD_TORCH_CHECK(grad.dim() == 4, "grad: expected shape [N, C, H, W]");
  return between(grad, indices, grad.size(2), grad.size(3), window, false, sum, [](const auto& u) { u.gather(); });
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&fastcv::max_pool2d_cpu));
  m.impl("max_unpool2d", TORCH_BOX(&fastcv::max_unpool2d_cpu));
  m.impl("max_unpool2d_backward", TORCH_BOX(&fastcv::max_unpool2d_backward_cpu));
}
