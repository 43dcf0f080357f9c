// Masks of detections at their place in the image (He et al., "Mask R-CNN", ICCV 2017, section 3.1, inference).
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/types.h"

namespace fastcv {

template <class T>
struct PasteMasks {
  const T* masks;          // [count, mask_height, mask_width]
  const int64_t* corners;  // [count, 4]: x1, y1, x2, y2 in pixels, both included, of the mask with its border of zeros
  T* output;               // [count, height, width]
  int64_t count, mask_height, mask_width, border, height, width;
};

// One axis of one mask, resized to the pixels from `start` on.
template <class A>
struct PasteAxis {
  int64_t start, first, last;  // of which [first, last) are in the image
  int32_t size, border;        // of the mask, with and of its border
  A scale;

  // Inlined by force: a copy compiled for AVX-512 must not be what other files link to.
#define FASTCV_MEMBER FASTCV_HOST_DEVICE inline __attribute__((always_inline))
  FASTCV_MEMBER PasteAxis(int64_t low, int64_t high, int64_t mask, int64_t border, int64_t image)
      : start(clip(low)), size(int32_t(mask + 2 * border)), border(int32_t(border)) {
    const int64_t pixels = clip(high) - start + 1 > 1 ? clip(high) - start + 1 : 1;
    first = start > 0 ? start : 0;
    last = start + pixels < image ? start + pixels : image;
    if (clip(high) < start) last = first;  // no box
    scale = A(size) / A(pixels);
  }
  FASTCV_MEMBER bool has(int64_t pixel) const { return pixel >= first && pixel < last; }

  // Pixel i of the image lies between elements `low` and `high` of the mask, pixels being areas.
  struct Sample {
    int32_t low, high;  // counted from the border's first; that of a border is zero
    A fraction;
  };
  FASTCV_MEMBER Sample sample(int64_t i) const {
    A position = scale * (A(i - start) + A(0.5)) - A(0.5);
    position = position > 0 ? position : A(0);
    int32_t low = int32_t(position);
    low = low < size - 1 ? low : size - 1;
    const A fraction = position - A(low);
    return {low, low < size - 1 ? low + 1 : low, fraction < 1 ? fraction : A(1)};
  }
  // Of an element counted with the border: its index in the mask, -1 in the border.
  FASTCV_MEMBER int32_t in_mask(int32_t i) const { return i >= border && i < size - border ? i - border : -1; }

 private:
  FASTCV_MEMBER static int64_t clip(int64_t x) {
    constexpr int64_t kMost = int64_t(1) << 30;
    return x < -kMost ? -kMost : x > kMost ? kMost : x;
  }
#undef FASTCV_MEMBER
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Rows of an image go in bands; tasks begin <= t < end of count * bands.
    template <class T> int64_t paste_masks_bands(const PasteMasks<T>& task);
    template <class T> int64_t paste_masks_scratch(const PasteMasks<T>& task);  // elements
    template <class T> void paste_masks(const PasteMasks<T>& task, int64_t begin, int64_t end,
                                        accumulate_t<T>* scratch);)
