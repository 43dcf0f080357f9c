// nms, batched_nms and nms_padded on the device (nms_cuda.h). The IoU is computed as torchvision computes it.
#include "nms_cuda.h"

namespace fastcv::cuda {
namespace {

template <class T>
struct AxisAligned {
  using Number = T;
  using Box = cuda::Box<T>;
  T threshold;
  bool diou;

  explicit AxisAligned(const Criterion& c) : threshold(round_down<T>(c.iou_threshold)), diou(c.diou) {}

  __device__ static Box load(const T* boxes, int64_t row) { return load_box(boxes, row); }

  // Whether the overlap of two boxes is greater than the threshold.
  __device__ bool overlaps(const Box& a, const Box& b) const {
    T overlap = iou(a, b);
    if (diou) {
      const T width = (a.x2 > b.x2 ? a.x2 : b.x2) - (a.x1 < b.x1 ? a.x1 : b.x1);
      const T height = (a.y2 > b.y2 ? a.y2 : b.y2) - (a.y1 < b.y1 ? a.y1 : b.y1);
      const T dx = ((a.x1 + a.x2) - (b.x1 + b.x2)) * T(0.5), dy = ((a.y1 + a.y2) - (b.y1 + b.y2)) * T(0.5);
      overlap = overlap - (dx * dx + dy * dy) / (width * width + height * height);
    }
    return overlap > threshold;
  }
};

// The first candidates of an image that were kept, in the order of their scores; a block of threads for each image.
__global__ void __launch_bounds__(kBlock)
    nms_select_kernel(const uint8_t* keep, const int64_t* order, const int64_t* ids, int64_t classes, int64_t length,
                      PaddedOutput out) {
  __shared__ int count[kWords];
  const int64_t image = blockIdx.x, candidates = classes * length;
  const int t = int(threadIdx.x);
  int64_t found = 0;
  for (int64_t tile = 0; tile < candidates && found < out.limit; tile += kBlock) {
    const int64_t p = tile + t, candidate = p < candidates ? order[image * candidates + p] : 0;
    const bool keeps = p < candidates && keep[image * candidates + candidate];
    const Place place = place_in_block(keeps, count, kWords);
    if (const int64_t k = found + place.before; keeps && k < out.limit) {
      out.indices[image * out.limit + k] = candidate % length;
      out.labels[image * out.limit + k] = ids ? ids[image * length + candidate] : candidate / length;
    }
    found += place.all;
    __syncthreads();
  }
  if (found > out.limit) found = out.limit;
  if (t == 0) out.counts[image] = found;
  for (int64_t k = found + t; k < out.limit; k += kBlock)
    out.indices[image * out.limit + k] = out.labels[image * out.limit + k] = -1;
}

// ---- shells ---------------------------------------------------------------------------------------------------------


template <class T>
Tensor nms_typed(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& ids, Criterion criterion) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  return kept_indices(as_contiguous(boxes, dtype), as_contiguous(scores, dtype), ids, AxisAligned<T>(criterion));
}

Tensor nms_any(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, Criterion criterion) {
  check_nms(boxes, scores, idxs);
  const auto run = either_is_double(boxes, scores) ? nms_typed<double> : nms_typed<float>;
  return run(boxes, scores, as_contiguous(idxs, ScalarType::Long), criterion);
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, double iou_threshold, bool diou) {
  return nms_any(boxes, scores, std::nullopt, {iou_threshold, diou});
}

Tensor batched_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold,
                        bool diou) {
  return nms_any(boxes, scores, idxs, {iou_threshold, diou});
}

template <class T>
void nms_padded_typed(const Tensor& boxes_any, const Tensor& scores_any, const std::optional<Tensor>& ids,
                      Criterion criterion, double score_threshold, const PaddedOutput& out) {
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Stream stream(boxes_any);
  const Tensor boxes = as_contiguous(boxes_any, dtype), scores = as_contiguous(scores_any, dtype);
  const int64_t images = boxes.size(0), n = boxes.size(1), classes = scores.dim() == 3 ? scores.size(1) : 1;
  const Tensor rows = torch::stable::view(scores, {images * classes, n});
  Tensor order = stable_argsort(rows, true);
  const Tensor ranked =
      classes == 1 ? order : stable_argsort(torch::stable::view(scores, {images, classes * n}), true);
  if (ids) order = grouped(order, *ids);
  const Tensor keep =
      suppress(stream, boxes, rows, order, ids, classes, AxisAligned<T>(criterion), score_threshold, false);
  stream.launch(nms_select_kernel, {images}, kBlock, 0, data<uint8_t>(keep), data<int64_t>(ranked),
                ids ? data<int64_t>(*ids) : nullptr, classes, n, out);
}

std::tuple<Tensor, Tensor, Tensor> nms_padded_cuda(const Tensor& boxes, const Tensor& scores,
                                                   const std::optional<Tensor>& idxs, double iou_threshold,
                                                   int64_t max_output, double score_threshold, bool diou) {
  check_nms_padded(boxes, scores, idxs, max_output);
  const int64_t images = boxes.size(0);
  Tensor indices = empty_on(boxes, {images, max_output}, ScalarType::Long);
  Tensor labels = empty_on(boxes, {images, max_output}, ScalarType::Long);
  Tensor counts = empty_on(boxes, {images}, ScalarType::Long);
  const PaddedOutput out{mutable_data<int64_t>(indices), mutable_data<int64_t>(labels), mutable_data<int64_t>(counts),
                         max_output};
  const auto run = either_is_double(boxes, scores) ? nms_padded_typed<double> : nms_padded_typed<float>;
  run(boxes, scores, as_contiguous(idxs, ScalarType::Long), {iou_threshold, diou}, score_threshold, out);
  return {indices, labels, counts};
}

}  // namespace
}  // namespace fastcv::cuda

FASTCV_CUDA_LIBRARY(m) {
  m.impl("nms", TORCH_BOX(&fastcv::cuda::nms_cuda));
  m.impl("batched_nms", TORCH_BOX(&fastcv::cuda::batched_nms_cuda));
  m.impl("nms_padded", TORCH_BOX(&fastcv::cuda::nms_padded_cuda));
}
