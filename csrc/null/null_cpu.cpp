// Tensor shell of null: checks for memory safety, allocation, threads, choice of instruction set, registration.
#include "null.h"

#include "../common/stable.h"

namespace fastcv {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements; below, a second thread costs more than it saves

Tensor null_cpu(const Tensor& x_any) {
  const ScalarType dtype = x_any.scalar_type();
  const Tensor x = as_contiguous(x_any, dtype);
  Tensor out = torch::stable::empty_like(x);
  dispatch_floating(dtype, "x", [&](auto value) {
    using T = decltype(value);
    parallel_for(x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      FASTCV_PICK(null_forward<T>)(data<T>(x) + begin, mutable_data<T>(out) + begin, end - begin);
    });
  });
  return out;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) { m.impl("null", TORCH_BOX(&fastcv::null_cpu)); }
