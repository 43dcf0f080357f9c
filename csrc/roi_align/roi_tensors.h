// What shells of the RoI operators do to pooled tensors, for every device.
#pragma once

#include "../common/stable.h"

namespace fastcv {

// Bins [PH, PW] that lie one stride apart, as kernels walk over them.
inline Tensor with_one_bin_stride(const Tensor& t) {
  return t.stride(2) == t.stride(3) * t.size(3) ? t : torch::stable::contiguous(t);
}

inline void check_pooled(const Tensor& t, const char* name, const Tensor& boxes, int64_t channels,
                         int64_t pooled_height, int64_t pooled_width) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == boxes.size(0) && t.size(1) == channels && t.size(2) == pooled_height &&
                      t.size(3) == pooled_width,
                  name, ": expected shape [", boxes.size(0), ", ", channels, ", ", pooled_height, ", ", pooled_width,
                  "]");
}

}  // namespace fastcv
