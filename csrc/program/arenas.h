// Memory of activations. Programs that run one after the other, as the parts of a detector do, use the same block; one
// that runs beside others has its own.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "../common/large_blocks.h"

namespace fastcv::program {

class Arenas {
 public:
  using Block = LargeBlocks::Block;

  static Arenas& instance() {
    static Arenas* const arenas = new Arenas;  // never destroyed: Python may free programs late
    return *arenas;
  }

  // Null memory where there is none, or nothing was asked for.
  Block take(size_t bytes) {
    Block block{nullptr, 0, true};
    if (bytes == 0) return block;
    {
      const std::lock_guard lock(mutex_);
      needed_ = std::max(needed_, bytes);
      if (!free_.empty()) block = free_.back(), free_.pop_back();
    }
    if (block.memory && block.bytes >= bytes) return block;
    if (block.memory) LargeBlocks::instance().give_back(block.memory);
    return LargeBlocks::instance().take(bytes);
  }

  // Kept for the next, unless it is much larger than any of the last runs needed.
  void give_back(const Block& block) {
    if (!block.memory) return;
    {
      const std::lock_guard lock(mutex_);
      const bool keeps = block.bytes <= 2 * needed_ + kSlack;
      if (++runs_ % kLastRuns == 0) needed_ = 0;
      if (keeps) {
        free_.push_back(block);
        return;
      }
    }
    LargeBlocks::instance().give_back(block.memory);
  }

  // When the last program is gone.
  void clear() {
    std::vector<Block> blocks;
    {
      const std::lock_guard lock(mutex_);
      blocks.swap(free_);
    }
    for (const Block& block : blocks) LargeBlocks::instance().give_back(block.memory);
  }

 private:
  static constexpr size_t kSlack = size_t(8) << 20;
  static constexpr int kLastRuns = 64;

  std::mutex mutex_;
  std::vector<Block> free_;
  size_t needed_ = 0;  // the most since the count of runs was a multiple of kLastRuns
  int runs_ = 0;
};

}  // namespace fastcv::program
