// Stable least-significant-digit radix sort of keys with their row numbers; digits that all keys share cost no pass.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastcv {

template <class Key>
struct Keyed {
  Key key;
  int32_t row;
};

template <class Key>
void radix_sort(std::vector<Keyed<Key>>& items) {
  Key varying = 0;
  for (const auto& item : items) varying |= item.key ^ items[0].key;
  if (!varying) return;
  std::vector<Keyed<Key>> other(items.size());
  for (unsigned shift = 0; shift < 8 * sizeof(Key); shift += 8) {
    if (!((varying >> shift) & 255)) continue;
    int64_t start[257] = {};
    for (const auto& item : items) ++start[((item.key >> shift) & 255) + 1];
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (const auto& item : items) other[start[(item.key >> shift) & 255]++] = item;
    std::swap(items, other);
  }
}

// Keys whose ascending order is the descending order of the numbers; -0 and 0 are equal.
inline uint32_t descending_key(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
inline uint64_t descending_key(double x) {
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits >> 63 ? bits : ~(bits | (uint64_t(1) << 63));
}

}  // namespace fastcv
