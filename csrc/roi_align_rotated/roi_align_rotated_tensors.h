// What the shells of roi_align_rotated check, for every device.
#pragma once

#include "../roi_align/roi_tensors.h"

namespace fastcv {

struct RotatedConstants {
  double scale;
  int64_t pooled_height, pooled_width, sampling_ratio;
  bool aligned, clockwise;
};

inline void check_rotated_regions(const Tensor& boxes, const RotatedConstants& c, int64_t height, int64_t width) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "boxes: expected shape [K, 6]");
  STD_TORCH_CHECK(boxes.size(0) < INT32_MAX, "boxes: expected fewer than 2^31 regions, got ", boxes.size(0));
  STD_TORCH_CHECK(c.pooled_height > 0 && c.pooled_width > 0, "output_size: expected at least 1 x 1, got ",
                  c.pooled_height, " x ", c.pooled_width);
  STD_TORCH_CHECK(c.sampling_ratio <= 1 << 15, "sampling_ratio: expected at most 2^15, got ", c.sampling_ratio);
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < INT32_MAX && width < INT32_MAX,
                  "input: expected fewer than 2^31 rows and columns, got ", height, " x ", width);
}

}  // namespace fastcv
