// A copy: whole vectors, then the rest.
#include "null.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {

template <class T>
void null_forward(const T* x, T* out, int64_t n) {
  constexpr int kStep = kLanes<accumulate_t<T>>;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(out + i, load(x + i));
  if (i < n) store_first(out + i, load_first(x + i, int(n - i)), int(n - i));
}

template void null_forward<float>(const float*, float*, int64_t);
template void null_forward<double>(const double*, double*, int64_t);
template void null_forward<half_t>(const half_t*, half_t*, int64_t);
template void null_forward<bfloat16_t>(const bfloat16_t*, bfloat16_t*, int64_t);

}  // namespace fastcv::FASTCV_ISA
