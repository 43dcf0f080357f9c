// Max pooling that remembers where its maxima were, and unpooling that puts values back there (Zeiler and Fergus,
// "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 2.1).
//
// An index is either flat, int64, y * W + x in the plane, as torch's; or compact, uint8, i * KW + j in the window.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/pool_window.h"
#include "../common/types.h"

namespace fastcv {

// Maps that are written or indexed are dense: contiguous, or channels-last where input.stride_c is 1 and channels_last.
template <class T>
struct MaxPool {
  PoolGeometry geometry;
  FeatureMap<const T> input;
  T* output;
  uint8_t* compact;  // of the two kinds of indices one at most is not null
  int64_t* flat;
  bool stream;  // results are larger than the caches
};

// Between windows [N, C, OH, OW] and maps [N, C, H, W], all dense and in one memory format.
template <class T>
struct MaxUnpool {
  PoolGeometry geometry;
  int64_t images, channels;
  const T* from;
  T* to;
  const uint8_t* compact;  // one of the two is null
  const int64_t* flat;
  Coverings rows;     // windows, ascending, that cover row y
  Coverings columns;  // contiguous: offset m of window x / stride - m and tap, by (x + padding) % stride; else as rows
  bool sum;  // where windows meet their values are added up; otherwise the last window's stays
  bool stream;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Rows of the output: begin <= plane * OH + oy < end, or image * OH + oy on channels-last maps.
    template <class T> void max_pool2d_contiguous(const MaxPool<T>& task, int64_t begin, int64_t end);
    template <class T> void max_pool2d_channels_last(const MaxPool<T>& task, int64_t begin, int64_t end);
    // Writes rows begin <= plane * H + y < end of the map (image * H + y), each element once; returns how many windows
    // it found to point at the pixels of these rows. If these are not all windows in the end, flat indices point
    // elsewhere than into their windows, and the map is to be written again by max_unpool2d_anywhere.
    template <class T> int64_t max_unpool2d_contiguous(const MaxUnpool<T>& task, int64_t begin, int64_t end);
    template <class T> int64_t max_unpool2d_channels_last(const MaxUnpool<T>& task, int64_t begin, int64_t end);
    // The reverse, from maps to windows, rows of windows; which must not meet unless `sum`. Returns the same count.
    template <class T> int64_t max_unpool2d_gather_contiguous(const MaxUnpool<T>& task, int64_t begin, int64_t end);
    template <class T> int64_t max_unpool2d_gather_channels_last(const MaxUnpool<T>& task, int64_t begin, int64_t end);)

namespace fastcv {

// How planes lie in a dense map: element (n, c, p) at n * image + c * channel + p * pixel.
struct PlaneStrides {
  int64_t image, channel, pixel;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // One channel of one image, with indices pointing anywhere; goes by the windows in reading order. Return the first
    // window whose index is no pixel of the map, or -1. Scratch: H * W sums if `sum`; H * W owners for gathering, or
    // null where no two windows have one pixel.
    template <class T> int64_t max_unpool2d_anywhere(const MaxUnpool<T>& task, PlaneStrides map, PlaneStrides windows,
                                                     int64_t image, int64_t channel, accumulate_t<T>* sums);
    // The same sums of flat indices in n channels from c on of a channels-last map; false where an index is no pixel.
    // Scratch: H * W * n sums.
    template <class T> bool max_unpool2d_add_block(const MaxUnpool<T>& task, int64_t image, int64_t c, int64_t n,
                                                   accumulate_t<T>* sums);
    template <class T> int64_t max_unpool2d_gather_anywhere(const MaxUnpool<T>& task, PlaneStrides map,
                                                            PlaneStrides windows, int64_t image, int64_t channel,
                                                            int32_t* owners);)
