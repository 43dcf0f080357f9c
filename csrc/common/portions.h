// Items of uneven cost for threads that work at them together: each has its own portion, the same in every call,
// because what it read and wrote last time lies in its own cache; one that is done takes from the others' portions.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastcv {

struct alignas(64) Counter {  // a cache line each
  std::atomic<int64_t> value{0};
};

// Calls f(item) for every one of `items` that this thread is the first to claim, its own portion first. `claimed`: as
// many counters as there are portions, zero before the first thread begins.
template <class F>
void each_claimed(int64_t items, int64_t portions, int64_t own, Counter* claimed, const F& f) {
  for (int64_t i = 0; i < portions; ++i) {
    const int64_t portion = (own + i) % portions;
    const int64_t begin = items * portion / portions, end = items * (portion + 1) / portions;
    std::atomic<int64_t>& next = claimed[portion].value;
    for (int64_t item; (item = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) f(item);
  }
}

}  // namespace fastcv
