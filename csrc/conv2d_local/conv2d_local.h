// Locally connected layers: convolution with weights of its own at every output pixel (DeepFace: Taigman, Yang,
// Ranzato, Wolf, "DeepFace", CVPR 2014, section 3).
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

struct Conv2dLocalShape {
  int64_t images, channels, height, width;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t depth() const { return channels * kernel_h * kernel_w; }
  int64_t pixels() const { return out_height * out_width; }
};

// The three tensors that a locally connected layer relates; each pass reads two of them and writes the third. Maps have
// any strides, weights are [OH, OW, K, C, KH, KW].
template <class T>
struct Conv2dLocal {
  Conv2dLocalShape shape;
  FeatureMap<const T> input;   // [N, C, H, W]
  FeatureMap<const T> output;  // [N, K, OH, OW]: read as a gradient
  const T* weight;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    template <class T> int64_t conv2d_local_scratch(const Conv2dLocalShape& shape);  // elements
    // Output pixels begin <= p < end of OH * OW, for all images.
    template <class T> void conv2d_local_forward(const Conv2dLocal<T>& task, int64_t begin, int64_t end,
                                                 const FeatureMap<T>& output, accumulate_t<T>* scratch);
    template <class T> void conv2d_local_weight_gradient(const Conv2dLocal<T>& task, int64_t begin, int64_t end,
                                                         T* gradient, accumulate_t<T>* scratch);
    // Gradients of the pixels' patches, [OH * OW][N][C][KH * KW], and planes begin <= i < end of N * C of the input's,
    // summed from them.
    template <class T>
    void conv2d_local_patch_gradient(const Conv2dLocal<T>& task, int64_t begin, int64_t end, accumulate_t<T>* patches);
    template <class T>
    void conv2d_local_fold(const Conv2dLocalShape& shape, const accumulate_t<T>* patches, int64_t begin, int64_t end,
                           const FeatureMap<T>& gradient, accumulate_t<T>* scratch);)
