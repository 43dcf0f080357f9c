// Bilinear resizing of small masks straight into their places; the rest of the image is filled with zeros.
//
// A task is some rows of one mask's image. Where each column of the image samples the mask is found once for all of
// them. For a row, two rows of the mask are blended, some 30 numbers that stay in the first-level cache, and each pixel
// blends two of these.
//
// 100 masks of 28x28 in 800x1088: 348 MB are written, at 10 to 20 GB/s; a pixel inside a box takes about a cycle, and
// boxes are a fraction of the image. torchvision resizes each mask, copies it into a map of zeros, and stacks the maps.
#include "paste_masks_in_image.h"

#include <cstring>

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kTaskElements = 64 * 1024;

template <class T>
int64_t band_rows(const PasteMasks<T>& task) {
  return max_of(1, min_of(task.height, kTaskElements / max_of(1, task.width)));
}

// The columns of one mask's image: between which elements of a row each samples, and where.
template <class A>
struct Columns {
  int32_t* low;
  A* fraction;
};

// Elements `low` and `high` of all columns of a mask, blended; the last is there twice, for those that sample it alone.
template <class T, class A>
void blend_rows(const PasteMasks<T>& task, const T* mask, const PasteAxis<A>& y, const typename PasteAxis<A>::Sample& at,
                A* row) {
  const int32_t low = y.in_mask(at.low), high = y.in_mask(at.high);
  const int64_t size = task.mask_width + 2 * task.border;
  for (int64_t c = 0; c <= size; ++c) row[c] = 0;
  for (int64_t c = 0; c < task.mask_width; ++c) {
    const A above = low < 0 ? A(0) : to_accumulate(mask[low * task.mask_width + c]);
    const A below = high < 0 ? A(0) : to_accumulate(mask[high * task.mask_width + c]);
    row[task.border + c] = (1 - at.fraction) * above + at.fraction * below;
  }
  row[size] = row[size - 1];
}

template <class T>
void zero(T* p, int64_t n) {
  if (n > 0) memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
}

}  // namespace

template <class T>
int64_t paste_masks_bands(const PasteMasks<T>& task) {
  return ceil_div(task.height, band_rows(task));
}

template <class T>
int64_t paste_masks_scratch(const PasteMasks<T>& task) {
  return 2 * task.width + task.mask_width + 2 * task.border + 1;
}

template <class T>
void paste_masks(const PasteMasks<T>& task, int64_t begin, int64_t end, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const int64_t rows = band_rows(task), bands = ceil_div(task.height, rows);
  const Columns<A> columns{reinterpret_cast<int32_t*>(scratch), scratch + task.width};
  A* const blended = scratch + 2 * task.width;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t k = t / bands, y0 = t % bands * rows, y1 = min_of(task.height, y0 + rows);
    const int64_t* corners = task.corners + 4 * k;
    const PasteAxis<A> x(corners[0], corners[2], task.mask_width, task.border, task.width);
    const PasteAxis<A> y(corners[1], corners[3], task.mask_height, task.border, task.height);
    const T* const mask = task.masks + k * task.mask_height * task.mask_width;
    T* row = task.output + (k * task.height + y0) * task.width;
    if (x.first >= x.last || y.first >= y1 || y.last <= y0) {
      zero(row, (y1 - y0) * task.width);
      continue;
    }
    for (int64_t i = x.first; i < x.last; ++i) {
      const auto at = x.sample(i);
      columns.low[i] = at.low, columns.fraction[i] = at.fraction;
    }
    for (int64_t i = y0; i < y1; ++i, row += task.width) {
      if (!y.has(i)) {
        zero(row, task.width);
        continue;
      }
      blend_rows(task, mask, y, y.sample(i), blended);
      zero(row, x.first);
      for (int64_t j = x.first; j < x.last; ++j) {
        const A* at = blended + columns.low[j];
        from_accumulate((1 - columns.fraction[j]) * at[0] + columns.fraction[j] * at[1], row + j);
      }
      zero(row + x.last, task.width - x.last);
    }
  }
}

#define FASTCV_INSTANTIATE(T)                                      \
  template int64_t paste_masks_bands<T>(const PasteMasks<T>&);     \
  template int64_t paste_masks_scratch<T>(const PasteMasks<T>&);   \
  template void paste_masks<T>(const PasteMasks<T>&, int64_t, int64_t, accumulate_t<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
