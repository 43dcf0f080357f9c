// Boxes of one class for kernels of the suppression family: structure of arrays, in blocks of neighbours.
//
// A kernel that asks which boxes overlap a given one passes over the blocks whose bounding box it misses. Boxes that
// overlap nothing (no area, inverted, infinite) stay out of the bounding boxes.
#pragma once

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {

// The largest T not above x, so that comparing with it decides as comparing with x in double does.
FASTCV_INLINE double round_down(double x, double) { return x; }
FASTCV_INLINE float round_down(double x, float) {
  float f = float(x);
  if (!(double(f) > x)) return f;
  int32_t bits;
  memcpy(&bits, &f, 4);
  bits += f > 0 ? -1 : 1;
  memcpy(&f, &bits, 4);
  return f;
}

// 0, 1, 2, ...
template <class T>
FASTCV_INLINE Vec<SameSize<T>> lane_numbers() {
  Vec<SameSize<T>> numbers{};
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = i;
  return numbers;
}

constexpr int64_t kBlock = 128;  // boxes; a multiple of any kLanes

template <class T>
struct BoxBlocks {
  int64_t n, blocks, slots;             // boxes; blocks; n rounded up to whole vectors
  T *x1, *y1, *x2, *y2, *area;          // [slots]; beyond n zero, and NaN as area
  T *left, *top, *right, *bottom;       // [blocks] bounding boxes

  static int64_t count_blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }
  static int64_t count_slots(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  // Rounded up, so that what follows it is aligned to 64.
  static size_t bytes(int64_t n) {
    return (size_t(5 * count_slots(n) + 4 * count_blocks(n)) * sizeof(T) + 63) / 64 * 64;
  }

  BoxBlocks(int64_t count, void* memory) : n(count), blocks(count_blocks(count)), slots(count_slots(count)) {
    x1 = static_cast<T*>(memory);
    y1 = x1 + slots, x2 = y1 + slots, y2 = x2 + slots, area = y2 + slots;
    left = area + slots, top = left + blocks, right = top + blocks, bottom = right + blocks;
  }

  // rows: [n] of boxes [N, 4].
  void fill(const T* boxes, const int32_t* rows) {
    for (int64_t i = 0; i < slots; ++i) {
      const T zeros[4] = {};
      const T* p = i < n ? boxes + 4 * int64_t(rows[i]) : zeros;
      x1[i] = p[0], y1[i] = p[1], x2[i] = p[2], y2[i] = p[3];
      area[i] = i < n ? (p[2] - p[0]) * (p[3] - p[1]) : T(__builtin_nan(""));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const T infinity = T(__builtin_inf());
      left[b] = top[b] = infinity, right[b] = bottom[b] = -infinity;
      for (int64_t i = b * kBlock; i < end(b); ++i) {
        if (!(x2[i] > x1[i] && y2[i] > y1[i] && area[i] < infinity)) continue;
        left[b] = x1[i] < left[b] ? x1[i] : left[b], top[b] = y1[i] < top[b] ? y1[i] : top[b];
        right[b] = x2[i] > right[b] ? x2[i] : right[b], bottom[b] = y2[i] > bottom[b] ? y2[i] : bottom[b];
      }
    }
  }

  int64_t end(int64_t block) const { return (block + 1) * kBlock < n ? (block + 1) * kBlock : n; }
};

template <class T>
struct Box {
  T x1, y1, x2, y2, area;

  bool touches(const BoxBlocks<T>& b, int64_t block) const {
    return x1 < b.right[block] && x2 > b.left[block] && y1 < b.bottom[block] && y2 > b.top[block];
  }
  // Of kLanes<T> boxes from slot i on, with the operations of torchvision's nms in their order.
  Vec<T> intersection(const BoxBlocks<T>& b, int64_t i) const {
    const Vec<T> width = min(load(b.x2 + i), broadcast(x2)) - max(load(b.x1 + i), broadcast(x1));
    const Vec<T> height = min(load(b.y2 + i), broadcast(y2)) - max(load(b.y1 + i), broadcast(y1));
    return max(width, Vec<T>{}) * max(height, Vec<T>{});
  }
};

}  // namespace fastcv::FASTCV_ISA
