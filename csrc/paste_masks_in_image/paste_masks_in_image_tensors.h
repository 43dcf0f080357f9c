// From tensors to a task of paste_masks_in_image, with what memory safety asks for.
#pragma once

#include "../common/stable.h"
#include "paste_masks_in_image.h"

namespace fastcv {

inline void check_paste_masks(const Tensor& masks, const Tensor& corners, int64_t height, int64_t width,
                              int64_t border) {
  constexpr int64_t kMost = int64_t(1) << 24;
  STD_TORCH_CHECK(masks.dim() == 4 && masks.size(1) == 1, "masks: expected shape [N, 1, H, W]");
  STD_TORCH_CHECK(masks.size(2) > 0 && masks.size(3) > 0, "masks: expected masks of at least a pixel");
  STD_TORCH_CHECK(masks.size(2) < kMost && masks.size(3) < kMost, "masks: expected sides under 2^24");
  STD_TORCH_CHECK(corners.dim() == 2 && corners.size(0) == masks.size(0) && corners.size(1) == 4,
                  "corners: expected shape [", masks.size(0), ", 4]");
  STD_TORCH_CHECK(corners.scalar_type() == ScalarType::Long, "corners: expected int64");
  STD_TORCH_CHECK(height >= 0 && width >= 0, "img_shape: expected no negative sides, got ", height, " and ", width);
  STD_TORCH_CHECK(border >= 0 && border < kMost, "padding: expected 0 to 2^24, got ", border);
}

template <class T>
PasteMasks<T> paste_masks_task(const Tensor& masks, const Tensor& corners, const Tensor& output, int64_t border) {
  return {data<T>(masks), data<int64_t>(corners), mutable_data<T>(output), masks.size(0),  masks.size(2),
          masks.size(3),  border,                 output.size(2),          output.size(3)};
}

}  // namespace fastcv
