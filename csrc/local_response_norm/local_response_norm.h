// Local response normalisation (Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural
// networks", NIPS 2012, section 3.3): y_c = x_c d_c^-beta, d_c = k + alpha / size * (sum of x^2 over a window of
// channels).
#pragma once

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

template <class T>
struct LocalResponseNorm {
  FeatureMap<const T> input;  // contiguous or channels-last, as one row: height 1
  FeatureMap<const T> grad;   // of the output, in the input's format; forward: no data
  FeatureMap<T> output;       // or the gradient of the input
  bool channels_last;
  int64_t before, after;  // channels of the window beside its own
  accumulate_t<T> factor, beta, k;  // factor = alpha / size
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // The positions of an image go in parts; tasks begin <= t < end of images * parts.
    template <class T> int64_t local_response_norm_parts(const LocalResponseNorm<T>& task);
    template <class T> int64_t local_response_norm_scratch(const LocalResponseNorm<T>& task);  // elements
    template <class T> void local_response_norm(const LocalResponseNorm<T>& task, int64_t begin, int64_t end,
                                                accumulate_t<T>* scratch);
    template <class T> void local_response_norm_backward(const LocalResponseNorm<T>& task, int64_t begin, int64_t end,
                                                         accumulate_t<T>* scratch);)
