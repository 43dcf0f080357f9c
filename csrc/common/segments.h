// Detections grouped by class, for operators that treat classes apart.
#pragma once

#include <algorithm>

#include "radix_sort.h"
#include "stable.h"

namespace fastcv {

struct Segments {
  std::vector<int32_t> items;   // segment by segment, in the order they were given in
  std::vector<int64_t> starts;  // [count + 1] where each segment starts in items
  int64_t count = 0, longest = 0;

  int64_t size(int64_t segment) const { return starts[segment + 1] - starts[segment]; }
  // How many segments one task of parallel_for takes on, so that it has about task_items items.
  int64_t grain(int64_t task_items) const {
    return std::max<int64_t>(1, task_items * count / std::max<int64_t>(int64_t(items.size()), 1));
  }
};

// Groups 0, ..., n - 1 by id_of(i); segments come by ascending id, taken as an unsigned number.
template <class IdOf>
Segments group_by_id(int64_t n, const IdOf& id_of) {
  std::vector<Keyed<uint64_t>> keyed(n);
  for (int64_t i = 0; i < n; ++i) keyed[i] = {uint64_t(id_of(i)), int32_t(i)};
  radix_sort(keyed);
  Segments segments;
  segments.items.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    segments.items[i] = keyed[i].row;
    if (i == 0 || keyed[i].key != keyed[i - 1].key) segments.starts.push_back(i);
  }
  segments.count = int64_t(segments.starts.size());
  segments.starts.push_back(n);
  for (int64_t s = 0; s < segments.count; ++s) segments.longest = std::max(segments.longest, segments.size(s));
  return segments;
}

// All of 0, ..., n - 1 as one class.
inline Segments one_segment(int64_t n) {
  Segments segments;
  segments.items.resize(n);
  for (int64_t i = 0; i < n; ++i) segments.items[i] = int32_t(i);
  segments.starts = {0, n};
  segments.count = 1, segments.longest = n;
  return segments;
}

}  // namespace fastcv
