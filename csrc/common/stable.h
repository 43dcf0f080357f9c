// All of libtorch's stable ABI that the CPU and CUDA shells use, in one place.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "types.h"

namespace fastcv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) with the storage type of a floating dtype; shells read T as decltype.
template <class F>
void dispatch_floating(ScalarType dtype, const char* argument, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(half_t{});
    case ScalarType::BFloat16: return f(bfloat16_t{});
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Contiguous and of the given type; the tensor itself where it already is.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  Tensor typed = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

inline Tensor empty_cpu(std::initializer_list<int64_t> size, ScalarType dtype,
                        MemoryFormat format = MemoryFormat::Contiguous) {
  std::vector<int64_t> sizes(size);
  return torch::stable::empty(sizes, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU), std::nullopt, format);
}

// f(begin, end) over [0, n) on torch's own threads; torch.set_num_threads is obeyed.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace fastcv
