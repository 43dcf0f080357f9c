#include "conv2d_kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>

#include "../common/window_size.h"

namespace fastcv {
namespace {

#define FASTCV_KERNEL(number, name, serves)                                                                          \
  Conv2dKernel {                                                                                                     \
    number, #name, FASTCV_PICK(conv2d_##name##_weights), FASTCV_PICK(conv2d_##name##_prepare),                       \
        FASTCV_PICK(conv2d_##name##_tasks), FASTCV_PICK(conv2d_##name##_scratch), FASTCV_PICK(conv2d_##name), serves \
  }

bool is_undilated(const Conv2dShape& s) { return s.dilation_h == 1 && s.dilation_w == 1; }

// Each phase is looked at, and most are empty where there are so many.
constexpr int64_t kMostPhases = int64_t(1) << 16;

// Dilated ones fall into dilation x dilation ones of every dilation-th pixel, where they keep the size.
template <int64_t Size>
bool is_winograd(const Conv2dShape& s) {
  const bool phases = 2 * s.pad_h == s.dilation_h * (Size - 1) && 2 * s.pad_w == s.dilation_w * (Size - 1) &&
                      s.out_height == s.height && s.out_width == s.width && s.dilation_h * s.dilation_w <= kMostPhases;
  return s.kernel_h == Size && s.kernel_w == Size && s.stride_h == 1 && s.stride_w == 1 &&
         (is_undilated(s) || phases) && s.groups == 1 && !s.input_norm;
}

// Kernels smaller than 3x3 gain less, and only where there are channels enough to pay for the transforms.
bool is_small(const Conv2dShape& s) {
  return s.kernel_h <= 3 && s.kernel_w <= 3 && s.kernel_h * s.kernel_w > 1 && s.kernel_h * s.kernel_w < 9;
}
bool is_winograd_to_3(const Conv2dShape& s) {
  return is_winograd<3>(s) || (is_small(s) && s.stride_h == 1 && s.stride_w == 1 && is_undilated(s) && s.groups == 1 &&
                               !s.input_norm && s.channels >= 32 && s.out_channels >= 32);
}

// What AVX-512 has or has not is emulated elsewhere.
bool is_bf16(const Conv2dShape&) { return bf16_instructions() || cpu_isa() != CpuIsa::avx512; }

bool is_amx(const Conv2dShape& s) {
  return (amx_products() || cpu_isa() != CpuIsa::avx512) && FASTCV_PICK(conv2d_amx_serves)(s);
}

bool is_depthwise(const Conv2dShape& s) { return s.groups == s.channels && s.groups == s.out_channels; }

double round_up(int64_t channels) { return double((channels + 15) / 16 * 16); }

// Winograd's tiles, of patch x patch input pixels, by the number of their kernel.
struct WinogradTile {
  int64_t number, patch;
  bool fast;  // of Precision::fast alone
};
constexpr WinogradTile kWinogradTiles[] = {{1, 6, false}, {5, 4, false}, {8, 8, true},
                                           {9, 6, false}, {10, 8, true}, {11, 5, false}};

const WinogradTile* winograd_tile(const Conv2dKernel& kernel) {
  for (const WinogradTile& tile : kWinogradTiles)
    if (tile.number == kernel.number) return &tile;
  return nullptr;
}

bool rounds(const Conv2dKernel& kernel) { return kernel.number == 7 || kernel.number == 12; }

// In products of one pair of channels.
double direct_cost(const Conv2dShape& s) {
  const double elements = double(s.kernel_h * s.kernel_w);
  return double(s.images * s.out_height * s.out_width) * elements * (1 + 2 / double(s.channels));
}

// In the order of preference: the first that serves a shape is chosen.
const std::vector<Conv2dKernel>& kernels() {
  static const std::vector<Conv2dKernel> all{
      FASTCV_KERNEL(2, depthwise, is_depthwise),
      FASTCV_KERNEL(3, grouped, FASTCV_PICK(conv2d_grouped_serves)),
      FASTCV_KERNEL(6, gemv, FASTCV_PICK(conv2d_gemv_serves)),
      FASTCV_KERNEL(5, winograd_2x2, is_winograd_to_3),
      FASTCV_KERNEL(11, winograd_3x3, is_winograd_to_3),
      FASTCV_KERNEL(1, winograd, is_winograd_to_3),
      FASTCV_KERNEL(8, winograd_6x6, is_winograd<3>),
      FASTCV_KERNEL(9, winograd_5x5, is_winograd<5>),
      FASTCV_KERNEL(10, winograd_5x5_4x4, is_winograd<5>),
      FASTCV_KERNEL(12, amx, is_amx),
      FASTCV_KERNEL(7, bf16, is_bf16),
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

// The first that serves the shape, and of Winograd's the one that costs least, where that is less than the direct sum.
// What costs exactness must promise to be a tenth faster. Tiles of 5x5 pixels pay for kernels of 2 elements, for which
// they have 4 outputs along an axis and fit sizes that are powers of 2.
static const Conv2dKernel* cheapest(const Conv2dShape& shape, bool with_winograd, bool fast) {
  const Conv2dKernel* best = nullptr;
  double least = 0;
  for (const Conv2dKernel& kernel : kernels()) {
    if (rounds(kernel) || !kernel.serves(shape)) continue;  // bfloat16 only where it is asked for
    const WinogradTile* tile = winograd_tile(kernel);
    if (!tile) return best ? best : &kernel;
    if (!with_winograd || (tile->fast && !fast) || (tile->patch == 5 && !is_small(shape))) continue;
    const double cost = winograd_cost(shape, tile->patch) * (tile->fast ? 1.1 : 1),
                 limit = best ? least : direct_cost(shape);
    if (cost < limit) best = &kernel, least = cost;
  }
  return best;
}

// Instead of a kernel that rounds nothing, where that is slower. Tiles of the processor beat Winograd's fewer products.
// Those of pairs only where its tiles are small, with more weights to be read than there are products; and where pixels
// have few channels, rounding them takes as long as it saves.
static const Conv2dKernel* rounding(const Conv2dKernel& exact, const Conv2dShape& shape) {
  const Conv2dKernel* found = nullptr;
  if (amx_products())
    found = exact.number == 0 || winograd_tile(exact) ? conv2d_kernel("amx", shape) : nullptr;
  else if (bf16_products() && (exact.number == 0 || exact.number == 5) && shape.group_channels() >= 16)
    found = conv2d_kernel("bf16", shape);
  return found ? found : &exact;
}

const Conv2dKernel* conv2d_kernel(const std::string& name, const Conv2dShape& shape, Precision precision) {
  if (name != "auto") {
    for (const Conv2dKernel& kernel : kernels())
      if (name == kernel.name && kernel.serves(shape)) return &kernel;
    return nullptr;
  }
  const bool fast = precision == Precision::fast;
  const Conv2dKernel* kernel = cheapest(shape, precision != Precision::highest, fast);
  const WinogradTile* tile = kernel ? winograd_tile(*kernel) : nullptr;
  if (tile && tile->fast) return kernel;  // measured choices know nothing of these
  if (const Conv2dKernel* measured = chosen(shape))
    if (precision != Precision::highest || !winograd_tile(*measured)) kernel = measured;
  return precision == Precision::bfloat16 && kernel ? rounding(*kernel, shape) : kernel;
}

const Conv2dKernel* conv2d_kernel(int64_t number, const Conv2dShape& shape) {
  for (const Conv2dKernel& kernel : kernels())
    if (kernel.number == number && kernel.serves(shape)) return &kernel;
  return nullptr;
}

// Transforming the input takes as long as about 8 products with one channel for each of its elements (9 for tiles of 8
// x 8), and storing sums and transforming them back as long as 20 (22), along one axis half; a direct sum's store takes
// 2. Reading the weights comes after that, or before where it takes longer. From memory one takes as long as 12
// products (2 cores of Zen 4: 220 GFLOP/s, 37 GB/s; more cores have less memory each), from the last-level cache as
// long as 3; prefetching hides half of it.
double winograd_cost(const Conv2dShape& s, int64_t patch) {
  const int64_t patch_h = s.kernel_h == 1 ? 1 : patch, patch_w = s.kernel_w == 1 ? 1 : patch,
                elements = patch_h * patch_w;
  const int64_t tile_h = patch_h + 1 - s.kernel_h, tile_w = patch_w + 1 - s.kernel_w;
  const int64_t high = (s.out_height + s.dilation_h - 1) / s.dilation_h,
                wide = (s.out_width + s.dilation_w - 1) / s.dilation_w;
  const int64_t tiles =
      s.images * s.dilation_h * s.dilation_w * ((high + tile_h - 1) / tile_h) * ((wide + tile_w - 1) / tile_w);
  const double channels = double(s.channels), effort = (patch == 8 ? 1.1 : 1) / (patch_h == 1 || patch_w == 1 ? 2 : 1);
  const double transforms =
      8 * effort * round_up(s.channels) / channels / round_up(s.out_channels) + 20 * effort / channels;
  const bool cached = elements * s.channels * s.out_channels * 4 < (int64_t(4) << 20);
  const double products = double(tiles * elements) * (1 + transforms), reading = double(elements) * (cached ? 3 : 12);
  return std::max(products, reading) + reading / 2;
}

int64_t outputs_prepared_together(const Conv2dKernel& kernel, const Conv2dShape& s) {
  const bool panels = winograd_tile(kernel) || (kernel.number == 0 && s.groups == 1);
  return panels ? 64 : 0;
}

bool is_valid_window(const Conv2dShape& s) {
  return is_window(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h) &&
         is_window(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
}

bool set_output_size(Conv2dShape& s) {
  const int64_t reach_h = s.dilation_h * (s.kernel_h - 1) + 1, reach_w = s.dilation_w * (s.kernel_w - 1) + 1;
  if (s.height + 2 * s.pad_h < reach_h || s.width + 2 * s.pad_w < reach_w) return false;
  s.out_height = (s.height + 2 * s.pad_h - reach_h) / s.stride_h + 1;
  s.out_width = (s.width + 2 * s.pad_w - reach_w) / s.stride_w + 1;
  return true;
}

}  // namespace fastcv
