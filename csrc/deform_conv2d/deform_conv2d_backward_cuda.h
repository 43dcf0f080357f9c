// What the CUDA kernels of deformable convolution's backward pass share.
#pragma once

#include "deform_conv2d_cuda.h"

namespace fastcv::cuda::deform {

template <class T>
struct Backward {
  using A = accumulate_t<T>;
  DeformConv2dShape shape;
  Counts counts;
  Map<T> grad, input;
  const Point<A>* points;  // [batch, offset_groups, taps, pixels of an image]
  bool vector;             // grad and input can be read in fours
};

// Some channels of some images.
template <class A>
struct Slab {
  int64_t first_image, images;
  int first, last;  // channels
  A* columns;       // [images, taps, pixels of an image, channels]

  FASTCV_HOST_DEVICE int channels() const { return last - first; }
};

struct Range {
  int first, last;
};

// Groups of so many channels that have some in the slab.
template <class A>
Range groups_of(const Slab<A>& slab, int channels) {
  return {slab.first / channels, (slab.last - 1) / channels + 1};
}

// The slab's channels in such a group.
template <class A>
__device__ Range intersect(const Slab<A>& slab, int group, int channels) {
  const int first = group * channels, last = first + channels;
  return {first > slab.first ? first : slab.first, last < slab.last ? last : slab.last};
}

// Fills slab.columns.
template <class T>
void make_columns(const Stream& stream, const Backward<T>& b, const Tensor& weight, Slab<accumulate_t<T>> slab);

// In the type of sums: [out_channels, channels of a group, taps] and [out_channels].
template <class T>
Tensor weight_gradient(const Stream& stream, const Backward<T>& b, const Tensor& like);
template <class T>
Tensor bias_gradient(const Stream& stream, const Backward<T>& b, const Tensor& like);

}  // namespace fastcv::cuda::deform
