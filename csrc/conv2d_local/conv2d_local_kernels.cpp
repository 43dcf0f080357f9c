// The loops of locally connected layers: a small matrix times a vector (of each image) at every output pixel.
//
// Weights are used once for each image, so that reading them is what a pass takes: 4 K C KH KW bytes an output pixel in
// float32, for 2 K C KH KW operations an image. They are read in order, [pixel][output channel][C, KH, KW]. The patches
// of input that a pixel sees, in the same order and of all images (of kMostPatches elements at a time), are gathered
// first and stay in cache: forward, tiles of 4 output channels by up to 4 images are dot products over a patch.
//
// Gradient of the weights: outer products, written once. Gradient of the input: each pixel's patch gradients, kept, are
// added to the input plane by plane, in the order of pixels, for any number of threads.
#include "conv2d_local.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

constexpr int64_t kMostPatches = 128 * 1024;

// A patch in scratch memory, padded to whole vectors.
template <class T>
int64_t patch_step(const Conv2dLocalShape& s) {
  constexpr int64_t L = kLanes<Acc<T>>;
  return (s.depth() + L - 1) / L * L;
}
// Images whose patches are in scratch memory together.
template <class T>
int64_t images_together(const Conv2dLocalShape& s) {
  return max_of(1, min_of(s.images, kMostPatches / max_of(1, patch_step<T>(s))));
}

// What output pixel p sees of an image, [C][KH][KW], zeros outside the map and after the end.
template <class T>
void gather_patch(const Conv2dLocal<T>& task, int64_t image, int64_t p, Acc<T>* patch) {
  const Conv2dLocalShape& s = task.shape;
  const FeatureMap<const T>& map = task.input;
  const int64_t top = p / s.out_width * s.stride_h - s.pad_h, left = p % s.out_width * s.stride_w - s.pad_w;
  Acc<T>* to = patch;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t i = 0; i < s.kernel_h; ++i, to += s.kernel_w) {
      const int64_t y = top + i * s.dilation_h;
      const T* const row = map.data + image * map.stride_n + c * map.stride_c + y * map.stride_y;
      for (int64_t j = 0; j < s.kernel_w; ++j) {
        const int64_t x = left + j * s.dilation_w;
        to[j] = y >= 0 && y < s.height && x >= 0 && x < s.width ? to_accumulate(row[x * map.stride_x]) : Acc<T>(0);
      }
    }
  for (Acc<T>* const end = patch + patch_step<T>(s); to < end; ++to) *to = 0;
}

// f(pixel, first image, images) for the output pixels begin <= p < end, whose patches of these images are in scratch
// memory then.
template <class T, class F>
FASTCV_INLINE void each_patches(const Conv2dLocal<T>& task, int64_t begin, int64_t end, Acc<T>* scratch, const F& f) {
  const int64_t step = patch_step<T>(task.shape), together = images_together<T>(task.shape);
  for (int64_t p = begin; p < end; ++p)
    for (int64_t first = 0; first < task.shape.images; first += together) {
      const int64_t images = min_of(together, task.shape.images - first);
      for (int64_t n = 0; n < images; ++n) gather_patch(task, first + n, p, scratch + n * step);
      f(p, first, images);
    }
}

template <class A>
FASTCV_INLINE A sum_of_lanes(Vec<A> x) {
  A sum = x[0];
  for (int i = 1; i < kLanes<A>; ++i) sum += x[i];
  return sum;
}

template <class T>
FASTCV_INLINE int64_t element(const FeatureMap<T>& map, int64_t n, int64_t k, int64_t p, int64_t width) {
  return n * map.stride_n + k * map.stride_c + p / width * map.stride_y + p % width * map.stride_x;
}

// Output channels k to k + R and images n to n + NB of a pixel.
template <int R, int NB, class T>
void dot_tile(const T* weight, const Acc<T>* patches, int64_t step, int64_t depth, int64_t k, int64_t n, int64_t p,
              int64_t width, const FeatureMap<T>& output) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][NB] = {};
  for (int64_t d = 0; d < depth; d += L) {
    Vec<A> x[NB];
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) x[b] = load(patches + b * step + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> w = load_some(weight + r * depth + d, depth - d);
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) sum[r][b] = fma(w, x[b], sum[r][b]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b)
      from_accumulate(sum_of_lanes<A>(sum[r][b]), output.data + element(output, n + b, k + r, p, width));
}

template <int R, class T>
void dot_rows(const T* weight, const Acc<T>* patches, int64_t step, int64_t depth, int64_t k, int64_t first,
              int64_t images, int64_t p, int64_t width, const FeatureMap<T>& output) {
  for (int64_t n = 0; n < images; n += 4) {
    const Acc<T>* const x = patches + n * step;
    switch (min_of(4, images - n)) {
      case 1: dot_tile<R, 1>(weight, x, step, depth, k, first + n, p, width, output); break;
      case 2: dot_tile<R, 2>(weight, x, step, depth, k, first + n, p, width, output); break;
      case 3: dot_tile<R, 3>(weight, x, step, depth, k, first + n, p, width, output); break;
      default: dot_tile<R, 4>(weight, x, step, depth, k, first + n, p, width, output);
    }
  }
}

}  // namespace

template <class T>
int64_t conv2d_local_scratch(const Conv2dLocalShape& s) {
  return max_of(images_together<T>(s) * patch_step<T>(s), s.height * s.width);
}

template <class T>
void conv2d_local_forward(const Conv2dLocal<T>& task, int64_t begin, int64_t end, const FeatureMap<T>& output,
                          Acc<T>* scratch) {
  const Conv2dLocalShape& s = task.shape;
  const int64_t depth = s.depth(), step = patch_step<T>(s);
  each_patches(task, begin, end, scratch, [&](int64_t p, int64_t first, int64_t images) {
    const T* const weight = task.weight + p * s.out_channels * depth;
    int64_t k = 0;
    for (; k + 4 <= s.out_channels; k += 4)
      dot_rows<4>(weight + k * depth, scratch, step, depth, k, first, images, p, s.out_width, output);
    for (; k < s.out_channels; ++k)
      dot_rows<1>(weight + k * depth, scratch, step, depth, k, first, images, p, s.out_width, output);
  });
}

template <class T>
void conv2d_local_weight_gradient(const Conv2dLocal<T>& task, int64_t begin, int64_t end, T* gradient,
                                  Acc<T>* scratch) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Conv2dLocalShape& s = task.shape;
  const int64_t depth = s.depth(), step = patch_step<T>(s);
  each_patches(task, begin, end, scratch, [&](int64_t p, int64_t first, int64_t images) {
    for (int64_t k = 0; k < s.out_channels; ++k) {
      T* const to = gradient + (p * s.out_channels + k) * depth;
      for (int64_t d = 0; d < depth; d += L) {
        Vec<A> sum = first ? load_some(to + d, depth - d) : Vec<A>{};
        for (int64_t n = 0; n < images; ++n) {
          const A g = to_accumulate(task.output.data[element(task.output, first + n, k, p, s.out_width)]);
          sum = fma(broadcast(g), load(scratch + n * step + d), sum);
        }
        store_some(to + d, sum, depth - d);
      }
    }
  });
}

template <class T>
void conv2d_local_patch_gradient(const Conv2dLocal<T>& task, int64_t begin, int64_t end, Acc<T>* patches) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Conv2dLocalShape& s = task.shape;
  const int64_t depth = s.depth();
  for (int64_t p = begin; p < end; ++p)
    for (int64_t n = 0; n < s.images; ++n) {
      A* const to = patches + (p * s.images + n) * depth;
      memset(to, 0, size_t(depth) * sizeof(A));
      for (int64_t k = 0; k < s.out_channels; k += 4) {  // rows of weights, four at a time
        const int rows = int(min_of(4, s.out_channels - k));
        const T* const weight = task.weight + (p * s.out_channels + k) * depth;
        Vec<A> g[4] = {};
        for (int r = 0; r < rows; ++r)
          g[r] = broadcast(to_accumulate(task.output.data[element(task.output, n, k + r, p, s.out_width)]));
        for (int64_t d = 0; d < depth; d += L) {
          Vec<A> sum = load_some(to + d, depth - d);
          for (int r = 0; r < rows; ++r) sum = fma(g[r], load_some(weight + r * depth + d, depth - d), sum);
          store_some(to + d, sum, depth - d);
        }
      }
    }
}

template <class T>
void conv2d_local_fold(const Conv2dLocalShape& s, const Acc<T>* patches, int64_t begin, int64_t end,
                       const FeatureMap<T>& gradient, Acc<T>* plane) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / s.channels, c = i % s.channels;
    memset(plane, 0, size_t(s.height * s.width) * sizeof(Acc<T>));
    for (int64_t p = 0; p < s.pixels(); ++p) {
      const int64_t top = p / s.out_width * s.stride_h - s.pad_h, left = p % s.out_width * s.stride_w - s.pad_w;
      const Acc<T>* const from = patches + ((p * s.images + n) * s.channels + c) * taps;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t y = top + t / s.kernel_w * s.dilation_h, x = left + t % s.kernel_w * s.dilation_w;
        if (y >= 0 && y < s.height && x >= 0 && x < s.width) plane[y * s.width + x] += from[t];
      }
    }
    T* const to = gradient.data + n * gradient.stride_n + c * gradient.stride_c;
    for (int64_t y = 0; y < s.height; ++y)
      for (int64_t x = 0; x < s.width; ++x)
        from_accumulate(plane[y * s.width + x], to + y * gradient.stride_y + x * gradient.stride_x);
  }
}

#define FASTCV_INSTANTIATE(T)                                                                                        \
  template int64_t conv2d_local_scratch<T>(const Conv2dLocalShape&);                                                 \
  template void conv2d_local_forward<T>(const Conv2dLocal<T>&, int64_t, int64_t, const FeatureMap<T>&, Acc<T>*);     \
  template void conv2d_local_weight_gradient<T>(const Conv2dLocal<T>&, int64_t, int64_t, T*, Acc<T>*);               \
  template void conv2d_local_patch_gradient<T>(const Conv2dLocal<T>&, int64_t, int64_t, Acc<T>*);                    \
  template void conv2d_local_fold<T>(const Conv2dLocalShape&, const Acc<T>*, int64_t, int64_t, const FeatureMap<T>&, \
                                     Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
