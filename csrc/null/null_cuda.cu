// The smallest CUDA operator, a template for new ones: fastcv::null(x) copies a float32 tensor.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../common/stable.h"

namespace fastcv {
namespace {

__global__ void null_kernel(const float* x, float* out, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) out[i] = x[i];
}

Tensor null_cuda(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x: expected a contiguous float32 tensor");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t n = x.numel();
  if (n > 0) {
    null_kernel<<<unsigned((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(data<float>(x),
                                                                                            mutable_data<float>(out), n);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "fastcv::null: ", cudaGetErrorString(error));
  }
  return out;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CUDA, m) { m.impl("null", TORCH_BOX(&fastcv::null_cuda)); }
