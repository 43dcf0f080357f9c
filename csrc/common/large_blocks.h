// Memory of large outputs, kept for the next ones.
//
// The C library gives blocks of more than 32 MB back to the system, so that every call gets fresh pages, which the
// system must clear first: 5 ms for 50 MB in pages of 2 MB, 20 ms in pages of 4 KB, and several times that in a virtual
// machine whose host must find them too. Most kernels take less to fill them. So blocks that were given back are kept,
// FASTCV_MEMORY_CACHE megabytes of them at most (0 keeps none); by default a 32nd of the machine's memory, from 128 to
// 512 MB. Pooling and unpooling 8 x 64 x 256 x 256 with gradients, maps of 134 MB, takes 25 ms with 512 MB and 200 ms
// with 128. The system may take the pages of large blocks that are kept when it needs memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastcv {

class LargeBlocks {
 public:
  static constexpr size_t kPage = size_t(1) << 21;    // a huge page
  static constexpr int64_t kLeast = int64_t(1) << 22;  // below, the C library keeps memory itself

  // Never destroyed: tensors may be freed after static objects are.
  static LargeBlocks& instance() {
    static LargeBlocks* const blocks = new LargeBlocks;
    return *blocks;
  }

  struct Block {
    void* memory;  // null where there is none
    size_t bytes;
    bool fresh;  // its pages were never touched
  };

  bool keeps() const { return limit_ > 0; }

  Block take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      const std::lock_guard lock(mutex_);
      size_t best = free_.size();
      for (size_t i = 0; i < free_.size(); ++i)
        if (free_[i].bytes >= bytes && free_[i].bytes <= 2 * bytes &&
            (best == free_.size() || free_[i].bytes <= free_[best].bytes))  // the latest: some of it is in a cache
          best = i;
      if (best < free_.size()) {
        const Block block = free_[best];
        free_.erase(free_.begin() + ptrdiff_t(best));
        kept_ -= block.bytes;
        return block;
      }
    }
    void* const memory = std::aligned_alloc(kPage, bytes);
    if (!memory) return {nullptr, 0, true};
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    const std::lock_guard lock(mutex_);
    size_of_[memory] = bytes;
    return {memory, bytes, true};
  }

  void give_back(void* memory) {
    std::vector<void*> out;  // freed without the lock
    size_t bytes;
    {
      const std::lock_guard lock(mutex_);
      bytes = size_of_.at(memory);
    }
    lend_to_system(memory, bytes);
    {
      const std::lock_guard lock(mutex_);
      free_.push_back({memory, bytes, false});
      kept_ += free_.back().bytes;
      while (kept_ > limit_) {  // the oldest first
        kept_ -= free_.front().bytes;
        size_of_.erase(free_.front().memory);
        out.push_back(free_.front().memory);
        free_.erase(free_.begin());
      }
    }
    for (void* block : out) std::free(block);
  }

 private:
  LargeBlocks() {
    const char* megabytes = std::getenv("FASTCV_MEMORY_CACHE");
    limit_ = megabytes ? size_t(std::strtoull(megabytes, nullptr, 10)) << 20 : default_limit();
  }

  static size_t default_limit() {
    constexpr size_t kLow = size_t(128) << 20, kHigh = size_t(512) << 20;
#if defined(__linux__)
    const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    return std::clamp(memory / 32, kLow, kHigh);
#else
    return kLow;
#endif
  }

  // A call to the system, which small blocks are not worth.
  static void lend_to_system([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_FREE)
    constexpr size_t kWorth = size_t(32) << 20;
    if (bytes >= kWorth) madvise(memory, bytes, MADV_FREE);
#endif
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> size_of_;  // of all blocks, kept or in use
  std::vector<Block> free_;                    // in the order in which they came back
  size_t kept_ = 0, limit_;
};

}  // namespace fastcv
