// Tensors of any type and positions of samples, one element at a time: for kernels of all instruction sets and CUDA's.
#pragma once

#include "../common/scalars.h"
#include "deform_conv2d.h"

namespace fastcv::FASTCV_ISA {
namespace {

// f(data) with the tensor's data as its own type.
template <class F>
FASTCV_SCALAR auto with_type(const AnyTensor& tensor, const F& f) {
  switch (tensor.type) {
    case FloatType::f64: return f(static_cast<const double*>(tensor.data));
    case FloatType::f16: return f(static_cast<const half_t*>(tensor.data));
    case FloatType::bf16: return f(static_cast<const bfloat16_t*>(tensor.data));
    default: return f(static_cast<const float*>(tensor.data));
  }
}

template <class A>
FASTCV_SCALAR A load_element(const AnyTensor& tensor, int64_t at) {
  return with_type(tensor, [&](auto* data) { return A(to_accumulate(data[at])); });
}

// One coordinate: its floor, its fraction and whether the floor and the next integer are in [0, size).
template <class A>
FASTCV_SCALAR void split(A position, int32_t size, int32_t* low, A* fraction, int32_t* low_valid, int32_t* high_valid) {
  A p = position >= A(-2) ? position : A(-2);  // NaN too
  p = p < A(size) ? p : A(size);
  int32_t floor = int32_t(p);
  floor -= A(floor) > p;
  *low = floor;
  *fraction = p - A(floor);
  *low_valid = (floor >= 0) & (floor < size);
  *high_valid = (floor >= -1) & (floor < size - 1);
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
