// Rotated boxes on the device: every pair, and greedy suppression by the steps of nms (../nms/nms_cuda.h).
//
// All is in float64, as on the CPU: boxes of a text line are a hundred times as long as high, and in float32 their IoU
// has two digits. A box is kept as six numbers, its sine and cosine among them, computed once.
//
// Operations: 12 for a pair whose circles do not meet, some 200 for others. Floor for 10,000 boxes of which half is
// kept and each is near 20: 5e7 pairs, 0.02 ms at 34e12 operations a second, and 0.1 million near ones; the launches,
// 43, are 0.1 ms. IoU of 10,000 x 1000: 40 MB, 0.01 ms at 4.3 TB/s, and 1.2e8 operations, as long.
#include "../nms/nms_cuda.h"
#include "box_iou_rotated.h"
#include "box_iou_rotated_tensors.h"

namespace fastcv::cuda {
namespace {

struct Rotated {
  using Number = double;
  using Box = RotatedBox<double>;
  double threshold;

  __device__ static Box load(const double* boxes, int64_t row) { return rotated_box(boxes + 5 * row); }

  __device__ bool overlaps(const Box& better, const Box& box) const {
    return (are_apart(better, box) ? 0 : rotated_iou(better, box)) > threshold;
  }
};

constexpr int kPairRows = 8, kPairColumns = 32;

// A thread has a pair.
template <class T>
__global__ void __launch_bounds__(kPairColumns * kPairRows)
    box_iou_rotated_kernel(const double* boxes1, const double* boxes2, int64_t n, int64_t m, T* out) {
  __shared__ RotatedBox<double> mine[kPairRows], others[kPairColumns];
  const int t = int(threadIdx.x);
  const int64_t row = blockIdx.x * int64_t(kPairRows), column = blockIdx.y * int64_t(kPairColumns);
  if (t < kPairRows && row + t < n) mine[t] = rotated_box(boxes1 + 5 * (row + t));
  if (t >= kPairColumns && t < 2 * kPairColumns && column + t - kPairColumns < m)
    others[t - kPairColumns] = rotated_box(boxes2 + 5 * (column + t - kPairColumns));
  __syncthreads();
  const int64_t i = row + t / kPairColumns, j = column + t % kPairColumns;
  if (i >= n || j >= m) return;
  const RotatedBox<double>&a = mine[t / kPairColumns], &b = others[t % kPairColumns];
  out[i * m + j] = T(are_apart(a, b) ? 0 : rotated_iou(a, b));
}

Tensor box_iou_rotated_cuda(const Tensor& boxes1_any, const Tensor& boxes2_any, bool wide) {
  check_rotated(boxes1_any, "boxes1"), check_rotated(boxes2_any, "boxes2");
  const Stream stream(boxes1_any);
  const Tensor boxes1 = as_contiguous(boxes1_any, ScalarType::Double),
               boxes2 = as_contiguous(boxes2_any, ScalarType::Double);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  Tensor out = empty_on(boxes1, {n, m}, wide ? ScalarType::Double : ScalarType::Float);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    stream.launch(box_iou_rotated_kernel<T>, {ceil_div(n, kPairRows), ceil_div(m, kPairColumns)},
                  kPairColumns * kPairRows, 0, data<double>(boxes1), data<double>(boxes2), n, m, mutable_data<T>(out));
  };
  wide ? run(double(0)) : run(float(0));
  return out;
}

Tensor nms_rotated_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                        double iou_threshold) {
  check_nms_rotated(boxes, scores, idxs);
  return kept_indices(as_contiguous(boxes, ScalarType::Double), as_contiguous(scores, ScalarType::Double),
                      as_contiguous(idxs, ScalarType::Long), Rotated{iou_threshold});
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("box_iou_rotated", TORCH_BOX(&fastcv::cuda::box_iou_rotated_cuda));
  m.impl("nms_rotated", TORCH_BOX(&fastcv::cuda::nms_rotated_cuda));
}
