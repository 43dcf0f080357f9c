// Tensor shell of paste_masks_in_image.
#include "paste_masks_in_image_tensors.h"

namespace fastcv {
namespace {

Tensor paste_masks_in_image_cpu(const Tensor& masks_any, const Tensor& corners_any, int64_t height, int64_t width,
                                int64_t border) {
  check_paste_masks(masks_any, corners_any, height, width, border);
  const Tensor masks = as_contiguous(masks_any, masks_any.scalar_type());
  const Tensor corners = as_contiguous(corners_any, ScalarType::Long);
  Tensor output = empty_cpu({masks.size(0), 1, height, width}, masks.scalar_type());
  if (output.numel() == 0) return output;
  dispatch_floating(masks.scalar_type(), "masks", [&](auto zero) {
    using T = decltype(zero);
    const PasteMasks<T> task = paste_masks_task<T>(masks, corners, output, border);
    parallel_dynamic(task.count * FASTCV_PICK(paste_masks_bands<T>)(task), 1, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_scratch<accumulate_t<T>>(FASTCV_PICK(paste_masks_scratch<T>)(task));
      FASTCV_PICK(paste_masks<T>)(task, begin, end, scratch.get());
    });
  });
  return output;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("paste_masks_in_image", TORCH_BOX(&fastcv::paste_masks_in_image_cpu));
}
