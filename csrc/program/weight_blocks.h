// Memory for prepared weights: pieces of large blocks, which are freed together.
//
// Weights are read once a run, and the processor's prefetching ends where a page does: so they lie on huge pages. A
// block for each would waste half a huge page on average, 60 MB for a detector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcv::program {

class WeightBlocks {
 public:
  float* allocate(int64_t floats) {
    const size_t bytes = (size_t(floats) * sizeof(float) + kLine) / kLine * kLine;  // kernels fetch one line ahead
    if (bytes > left_) add_block(std::max((bytes + kPage - 1) / kPage * kPage, blocks_.empty() ? kPage : kBlock));
    float* const piece = next_;
    next_ += bytes / sizeof(float), left_ -= bytes;
    return piece;
  }

 private:
  static constexpr size_t kLine = 64, kPage = size_t(1) << 21, kBlock = 4 * kPage;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };

  void add_block(size_t bytes) {
    void* const memory = std::aligned_alloc(kPage, bytes);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    blocks_.emplace_back(next_ = static_cast<float*>(memory));
    left_ = bytes;
  }

  std::vector<std::unique_ptr<float[], Free>> blocks_;
  float* next_ = nullptr;
  size_t left_ = 0;  // bytes
};

}  // namespace fastcv::program
