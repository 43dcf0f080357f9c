// All of libtorch's stable ABI that the CPU and CUDA shells use, in one place.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "feature_map.h"
#include "large_blocks.h"
#include "portions.h"
#include "types.h"

namespace fastcv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) with the storage type of a floating dtype; shells read T as decltype.
template <class F>
void dispatch_floating(ScalarType dtype, const char* argument, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(half_t{});
    case ScalarType::BFloat16: return f(bfloat16_t{});
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Contiguous and of the given type; the tensor itself where it already is.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  Tensor typed = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(as_contiguous(*tensor, dtype)) : std::nullopt;
}

inline bool either_is_double(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
}

// Whether a 4-D tensor lies in memory as channels-last: torch's own rule (suggest_memory_format), ambiguities included.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 0 || tensor.stride(d) < least || (d == 0 && least == tensor.stride(1))) return false;
    least = tensor.stride(d);
    if (tensor.size(d) > 1) least *= tensor.size(d);
  }
  return true;
}
inline MemoryFormat memory_format(const Tensor& tensor) {
  return is_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

template <class T>
FeatureMap<T> feature_map(const Tensor& t) {
  T* pointer;
  if constexpr (std::is_const_v<T>)
    pointer = data<std::remove_const_t<T>>(t);
  else
    pointer = mutable_data<T>(t);
  return {pointer,     t.size(0),   t.size(1),   t.size(2),  t.size(3),
          t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// f(begin, end) over [0, n) on torch's own threads; torch.set_num_threads is obeyed.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, f);
}

// An uninitialised CPU tensor of four dimensions, or of any number where it is contiguous.
inline Tensor empty_cpu(std::initializer_list<int64_t> size, ScalarType dtype,
                        MemoryFormat format = MemoryFormat::Contiguous) {
  const std::vector<int64_t> sizes(size);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const bool wide = dtype == ScalarType::Double || dtype == ScalarType::Long;
  const bool narrow = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  int64_t bytes = wide ? 8 : narrow ? 2 : dtype == ScalarType::Byte ? 1 : 4;
  bool overflow = false;
  for (int64_t n : sizes) overflow |= n < 0 || __builtin_mul_overflow(bytes, n, &bytes);
  if (overflow || bytes < LargeBlocks::kLeast || !LargeBlocks::instance().keeps())  // torch raises for what cannot be
    return torch::stable::empty(sizes, dtype, std::nullopt, cpu, std::nullopt, format);
  const LargeBlocks::Block block = LargeBlocks::instance().take(size_t(bytes));
  STD_TORCH_CHECK(block.memory, "fastcv: cannot allocate ", bytes, " bytes for the output");
  if (block.fresh)  // by one thread each: two that meet in a page would both clear it, and one of them for nothing
    parallel_for(int64_t(block.bytes / LargeBlocks::kPage), 2, [&](int64_t from, int64_t to) {
      for (int64_t page = from; page < to; ++page)
        *(static_cast<volatile char*>(block.memory) + page * int64_t(LargeBlocks::kPage)) = 0;
    });
  std::vector<int64_t> strides(sizes.size());
  if (format == MemoryFormat::ChannelsLast) {
    strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  } else {
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  }
  return torch::stable::from_blob(block.memory, sizes, strides, cpu, dtype,
                                  [](void* memory) { LargeBlocks::instance().give_back(memory); });
}

// The same for items of uneven cost, `grain` of them at a time (portions.h).
template <class F>
void parallel_dynamic(int64_t n, int64_t grain, const F& f) {
  const int64_t blocks = (n + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), blocks);
  const auto block = [&](int64_t i) { f(i * grain, std::min(n, (i + 1) * grain)); };
  if (threads <= 1) {
    for (int64_t i = 0; i < blocks; ++i) block(i);
    return;
  }
  const std::unique_ptr<Counter[]> claimed(new Counter[size_t(threads)]);
  parallel_for(threads, 1, [&](int64_t me, int64_t) { each_claimed(blocks, threads, me, claimed.get(), block); });
}

// Of an output that nobody reads at once: it is written past the caches. Convolution of 64 to 256 channels, 1x1, 200 x
// 272 pixels (56 MB): 9.3 ms instead of 11.5 on 2 cores of Zen 4.
template <class T>
bool exceeds_caches(const Tensor& t) {
  return t.numel() * int64_t(sizeof(T)) >= int64_t(16) << 20;
}

// Scratch memory aligned to 64 bytes. Each thread keeps the largest block of up to 16 MB that it gave back: memory
// fresh from the system costs a page fault every 4 KB, more than many a kernel needs to fill it.
constexpr size_t kScratchKept = size_t(16) << 20;

struct FreeScratch {
  size_t bytes = 0;
  void operator()(void* p) const;
};

struct KeptScratch {
  void* block = nullptr;
  size_t bytes = 0;
  ~KeptScratch() { std::free(block); }

  static KeptScratch& of_this_thread() {
    thread_local KeptScratch kept;
    return kept;
  }
};

inline void FreeScratch::operator()(void* p) const {
  KeptScratch& kept = KeptScratch::of_this_thread();
  if (bytes > kept.bytes && bytes <= kScratchKept) {
    std::swap(p, kept.block);
    kept.bytes = bytes;
  }
  std::free(p);
}

template <class T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

template <class T>
Scratch<T> allocate_scratch(size_t elements) {
  const size_t bytes = (elements * sizeof(T) + 127) / 64 * 64;
  KeptScratch& kept = KeptScratch::of_this_thread();
  if (bytes <= kept.bytes) {
    T* const block = static_cast<T*>(std::exchange(kept.block, nullptr));
    return Scratch<T>(block, FreeScratch{std::exchange(kept.bytes, 0)});
  }
  void* p = std::aligned_alloc(64, bytes);
  STD_TORCH_CHECK(p, "fastcv: cannot allocate ", bytes, " bytes of scratch memory");
  return Scratch<T>(static_cast<T*>(p), FreeScratch{bytes});
}

}  // namespace fastcv
