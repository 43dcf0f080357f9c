// The smallest CUDA operator, a template for new ones: kernel, then shell and registration.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../common/stable.h"

namespace fastcv {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void null_forward_kernel(const T* x, T* out, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) out[i] = x[i];
}

Tensor null_cuda(const Tensor& x_any) {
  const ScalarType dtype = x_any.scalar_type();
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = as_contiguous(x_any, dtype);
  Tensor out = torch::stable::empty_like(x);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t n = x.numel();
  if (n == 0) return out;
  dispatch_floating(dtype, "x", [&](auto value) {
    using T = decltype(value);
    null_forward_kernel<<<unsigned((n + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        data<T>(x), mutable_data<T>(out), n);
  });
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fastcv::null: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CUDA, m) { m.impl("null", TORCH_BOX(&fastcv::null_cuda)); }
