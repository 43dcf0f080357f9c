#include "conv2d_kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>

namespace fastcv {
namespace {

#define FASTCV_KERNEL(number, name, serves)                                                                              \
  Conv2dKernel{number, #name, FASTCV_PICK(conv2d_##name##_weights), FASTCV_PICK(conv2d_##name##_prepare),                  \
               FASTCV_PICK(conv2d_##name##_tasks), FASTCV_PICK(conv2d_##name##_scratch), FASTCV_PICK(conv2d_##name), serves}

// Kernels smaller than 3x3 gain less, and only where there are channels enough to pay for the transforms. Dilated ones fall
// into dilation x dilation ones of every dilation-th pixel.
bool is_winograd(const Conv2dShape& s) {
  if (s.stride_h != 1 || s.stride_w != 1 || s.groups != 1 || s.input_norm || s.kernel_h > 3 || s.kernel_w > 3) return false;
  const bool dilated = s.dilation_h != 1 || s.dilation_w != 1;
  if (s.kernel_h == 3 && s.kernel_w == 3) {
    const bool same_size = s.out_height == s.height && s.out_width == s.width;
    return !dilated || (s.dilation_h == s.pad_h && s.dilation_w == s.pad_w && same_size);
  }
  return s.kernel_h * s.kernel_w > 1 && !dilated && s.channels >= 32 && s.out_channels >= 32;
}

bool is_depthwise(const Conv2dShape& s) { return s.groups == s.channels && s.groups == s.out_channels; }

// 6, 5 or 4, whichever costs least; 5 pays for kernels of 2 elements, whose tiles of 4 outputs fit sizes that are powers of 2.
int64_t best_patch(const Conv2dShape& s) {
  const bool small = s.kernel_h < 3 || s.kernel_w < 3;
  int64_t best = 6;
  for (int64_t patch : {int64_t(5), int64_t(4)})
    if ((patch != 5 || small) && winograd_cost(s, patch) < winograd_cost(s, best)) best = patch;
  return best;
}

// In the order of preference: the first that serves a shape is chosen.
const std::vector<Conv2dKernel>& kernels() {
  static const std::vector<Conv2dKernel> all{
      FASTCV_KERNEL(2, depthwise, is_depthwise),
      FASTCV_KERNEL(3, grouped, FASTCV_PICK(conv2d_grouped_serves)),
      FASTCV_KERNEL(6, gemv, FASTCV_PICK(conv2d_gemv_serves)),
      FASTCV_KERNEL(5, winograd_2x2, is_winograd),
      FASTCV_KERNEL(8, winograd_3x3, is_winograd),
      FASTCV_KERNEL(1, winograd, is_winograd),
      FASTCV_KERNEL(7, bf16, [](const Conv2dShape&) { return true; }),
      FASTCV_KERNEL(0, gemm, [](const Conv2dShape&) { return true; }),
  };
  return all;
}

using Key = std::array<int64_t, 14>;

Key key_of(const Conv2dShape& s) {
  return {s.images, s.channels, s.height,     s.width,      s.out_channels, s.kernel_h, s.kernel_w,
          s.stride_h, s.stride_w, s.pad_h,    s.pad_w,      s.dilation_h,   s.dilation_w, s.groups};
}

struct Choices {
  std::mutex mutex;
  std::map<Key, const Conv2dKernel*> kernels;
  std::atomic<bool> any{false};

  static Choices& instance() {
    static Choices* const choices = new Choices;
    return *choices;
  }
};

const Conv2dKernel* chosen(const Conv2dShape& shape) {
  Choices& choices = Choices::instance();
  if (!choices.any || shape.input_norm) return nullptr;
  const std::lock_guard lock(choices.mutex);
  const auto found = choices.kernels.find(key_of(shape));
  return found == choices.kernels.end() ? nullptr : found->second;
}

}  // namespace

void choose_conv2d_kernel(const Conv2dShape& shape, const Conv2dKernel* kernel) {
  Choices& choices = Choices::instance();
  const std::lock_guard lock(choices.mutex);
  if (kernel)
    choices.kernels[key_of(shape)] = kernel;
  else
    choices.kernels.erase(key_of(shape));
  choices.any = !choices.kernels.empty();
}

// Faster than float32 with the instruction for it, slower without.
static bool has_bf16() {
#if defined(FASTCV_X86)
  return cpu_isa() == CpuIsa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const Conv2dKernel* conv2d_kernel(const std::string& name, const Conv2dShape& shape, Precision precision) {
  const Conv2dKernel* kernel = conv2d_kernel(name, shape);
  if (name != "auto" || !kernel) return kernel;
  const bool winograd = kernel->number == 1 || kernel->number == 5 || kernel->number == 8;
  if (precision == Precision::highest && winograd) return conv2d_kernel("gemm", shape);
  // Winograd's products are fewer than bfloat16's are faster, but for small tiles, whose weights are to be read.
  // Where pixels have few channels, rounding them takes as long as it saves.
  if (precision == Precision::bfloat16 && has_bf16() && shape.group_channels() >= 16 && (kernel->number == 0 || kernel->number == 5))
    return conv2d_kernel("bf16", shape);
  return kernel;
}

const Conv2dKernel* conv2d_kernel(const std::string& name, const Conv2dShape& shape) {
  if (name == "auto")
    if (const Conv2dKernel* kernel = chosen(shape)) return kernel;
  for (const Conv2dKernel& kernel : kernels())
    if ((name == "auto" || name == kernel.name) && kernel.serves(shape)) {
      if (name == "auto" && kernel.number == 7) continue;  // only where it is asked for
      if (name == "auto" && kernel.number == 5 && best_patch(shape) != 4) continue;
      if (name == "auto" && kernel.number == 8 && best_patch(shape) != 5) continue;
      return &kernel;
    }
  return nullptr;
}

// The arithmetic or reading the weights, whichever takes longer. From memory a weight takes as long as 12 products (2 cores of Zen 4: 220 GFLOP/s, 37 GB/s; more
// cores have less memory each), from the last-level cache as long as 3.
double winograd_cost(const Conv2dShape& s, int64_t patch) {
  const int64_t patch_h = s.kernel_h == 1 ? 1 : patch, patch_w = s.kernel_w == 1 ? 1 : patch, elements = patch_h * patch_w;
  const int64_t tile_h = patch_h + 1 - s.kernel_h, tile_w = patch_w + 1 - s.kernel_w;
  const int64_t high = (s.out_height + s.dilation_h - 1) / s.dilation_h, wide = (s.out_width + s.dilation_w - 1) / s.dilation_w;
  const int64_t tiles = s.images * s.dilation_h * s.dilation_w * ((high + tile_h - 1) / tile_h) * ((wide + tile_w - 1) / tile_w);
  const double products = double(tiles * elements);
  const bool cached = elements * s.channels * s.out_channels * 4 < (int64_t(4) << 20);
  return std::max(products, double(elements) * (cached ? 3 : 12));
}

bool set_output_size(Conv2dShape& s) {
  const int64_t reach_h = s.dilation_h * (s.kernel_h - 1) + 1, reach_w = s.dilation_w * (s.kernel_w - 1) + 1;
  if (s.height + 2 * s.pad_h < reach_h || s.width + 2 * s.pad_w < reach_w) return false;
  s.out_height = (s.height + 2 * s.pad_h - reach_h) / s.stride_h + 1;
  s.out_width = (s.width + 2 * s.pad_w - reach_w) / s.stride_w + 1;
  return true;
}

}  // namespace fastcv
