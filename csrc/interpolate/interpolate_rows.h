// What the two directions of resampling share.
#pragma once

#include "interpolate.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

// A row, and room for two vectors after it.
template <class T>
int64_t line_size(const FeatureMap<T>& map) {
  return map.width + 2 * kLanes<float>;
}

// The offset of a plane: an image, or a channel of one.
template <class T>
T* plane_of(const FeatureMap<T>& map, bool channels_last, int64_t plane) {
  return channels_last ? map.data + plane * map.stride_n
                       : map.data + plane / map.channels * map.stride_n + plane % map.channels * map.stride_c;
}

// Output that is written in order, piece by piece, to scratch memory, and from there past the caches in whole lines,
// wherever pieces begin. What was written last waits: it must have left the store buffer to be read across pieces.
template <class T>
class Stage {
 public:
  static constexpr int64_t kBytes = 16 * 1024, kWaiting = 2 * 1024, kFlushed = 1024;
  // Elements of scratch memory, aligned to lines, for pieces of so many and a vector after them.
  static constexpr int64_t size(int64_t piece) {
    return (kBytes + kWaiting + kFlushed + 128) / int64_t(sizeof(T)) + piece + kLanes<Acc<T>>;
  }

  Stage(T* to, void* scratch) : buffer_(static_cast<char*>(scratch)) {
    const int64_t head = int64_t(uintptr_t(to) & 63);
    to_ = reinterpret_cast<char*>(to) - head, flushed_ = filled_ = head;
  }
  // Room for the next piece, and a vector after it.
  FASTCV_INLINE T* next() { return reinterpret_cast<T*>(buffer_ + filled_); }
  FASTCV_INLINE void add(int64_t elements) {
    filled_ += elements * int64_t(sizeof(T));
    if (filled_ - flushed_ >= kWaiting + kFlushed) flush((filled_ - kWaiting) / 64 * 64);
  }
  void finish() {
    flush(filled_ / 64 * 64);
    memcpy(to_ + flushed_, buffer_ + flushed_, size_t(filled_ - flushed_));
  }

 private:
  void flush(int64_t end) {
    if (end <= flushed_) return;
    const int64_t line = (flushed_ + 63) / 64 * 64;  // before it, one that others write as well
    memcpy(to_ + flushed_, buffer_ + flushed_, size_t(line - flushed_));
    stream_copy(to_ + line, buffer_ + line, end - line);
    flushed_ = end;
    if (flushed_ < kBytes) return;
    memmove(buffer_, buffer_ + flushed_, size_t(filled_ - flushed_));
    to_ += flushed_, filled_ -= flushed_, flushed_ = 0;
  }

  char *buffer_, *to_;         // to_: a whole line, where the buffer belongs
  int64_t flushed_, filled_;  // bytes
};

}  // namespace
}  // namespace fastcv::FASTCV_ISA
