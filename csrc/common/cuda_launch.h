// What CUDA kernels and their shells share. All launches go through launch(), so that the tests can run the kernels
// on the host: tests/cuda_emulation has a cuda_runtime.h of its own, and operators are then those of the CPU.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>
#include <utility>

#define FASTCV_ISA cuda
#include "scalars.h"
#include "stable.h"

#if defined(FASTCV_CUDA_EMULATED)
#define FASTCV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m)
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define FASTCV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastcv, CUDA, m)
#endif

namespace fastcv::cuda {

// ---- in kernels -----------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
__device__ accumulate_t<T> load(const T* p) {
  return to_accumulate(*p);
}
template <class T>
__device__ void store(T* p, accumulate_t<T> x) {
  from_accumulate(x, p);
}

// The shared memory that a launch asked for.
template <class T>
__device__ T* dynamic_shared() {
#if defined(FASTCV_CUDA_EMULATED)
  return reinterpret_cast<T*>(emulation::machine().shared.data());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// ---- on the host ----------------------------------------------------------------------------------------------------

FASTCV_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastcv: ", cudaGetErrorString(error));
}

// The device of a tensor, the current one as long as this lives, and torch's stream on it.
class Stream {
 public:
#if defined(FASTCV_CUDA_EMULATED)
  explicit Stream(const Tensor&) {}
#else
  explicit Stream(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  cudaStream_t get() const { return stream_; }

  // blocks: along x, y and z; none: nothing to do. shared: bytes of dynamic_shared().
  template <class... P, class... A>
  void launch(void (*kernel)(P...), std::initializer_list<int64_t> blocks, int threads, size_t shared,
              A... arguments) const {
    unsigned size[3] = {1, 1, 1};
    int axis = 0;
    for (int64_t n : blocks) {
      if (n == 0) return;
      STD_TORCH_CHECK(n <= (axis ? 65535 : 0x7fffffff), "fastcv: ", n, " blocks along axis ", axis, " of a launch");
      size[axis++] = unsigned(n);
    }
    constexpr size_t kAlways = 48 << 10;  // more must be asked for
    if (shared > kAlways) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size[0], size[1], size[2]), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared, config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
  }

 private:
#if !defined(FASTCV_CUDA_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Uninitialised, on the device of another tensor.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype,
                       MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// The first element of a tensor; waits for it.
template <class T>
T read_first(const Tensor& x, const Stream& stream) {
  T value;
  check(cudaMemcpyAsync(&value, data<T>(x), sizeof value, cudaMemcpyDeviceToHost, stream.get()));
  check(cudaStreamSynchronize(stream.get()));
  return value;
}

// ---- operators of torch ---------------------------------------------------------------------------------------------

template <size_t N>
void call_torch(const char* name, const char* overload, StableIValue (&stack)[N]) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

// Indices that sort the last dimension; equal elements keep their order, and NaN is the greatest.
inline Tensor stable_argsort(const Tensor& x, bool descending) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(std::optional<bool>(true)), from(int64_t(-1)), from(descending)};
  call_torch("aten::sort", "stable", stack);
  torch::stable::detail::to<Tensor>(stack[0]);  // the sorted values: taken, so that they are freed
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// x[..., index[..., i]] along the last dimension.
inline Tensor gather(const Tensor& x, const Tensor& index) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(int64_t(-1)), from(index), from(false)};
  call_torch("aten::gather", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor masked_select(const Tensor& x, const Tensor& mask) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(mask)};
  call_torch("aten::masked_select", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fastcv::cuda
