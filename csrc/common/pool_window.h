// The windows of pooling, as shells and kernels see them.
#pragma once

#include <cstdint>

namespace fastcv {

// Files of several instruction sets include this, and the linker would keep one copy of a function for all.
#define FASTCV_POOL_INLINE __attribute__((always_inline))

// One axis: window o has the pixels o * stride - padding + k * dilation, k < kernel, those that lie in [0, input).
struct PoolAxis {
  int64_t input, output, kernel, stride, padding, dilation;

  FASTCV_POOL_INLINE int64_t start(int64_t o) const { return o * stride - padding; }
  // Values of (p + padding) % stride; all of 1 or 2 strides, for which kernels have vectors.
  FASTCV_POOL_INLINE int64_t phases() const {
    return stride <= 2 || stride < padding + input ? stride : padding + input;
  }
  FASTCV_POOL_INLINE bool disjoint() const { return stride >= (kernel - 1) * dilation + 1; }
  // Windows are pairs of pixels side by side.
  FASTCV_POOL_INLINE bool pairs() const {
    return kernel == 2 && stride == 2 && dilation == 1 && padding == 0 && input >= 2 * output;
  }
};

struct PoolGeometry {
  PoolAxis y, x;

  FASTCV_POOL_INLINE bool disjoint() const { return y.disjoint() && x.disjoint(); }
  FASTCV_POOL_INLINE bool two_by_two() const { return y.pairs() && x.pairs(); }
};

// Window o covers a pixel with its tap k.
struct Covering {
  int32_t window, tap;
};

// Lists of such pairs, one after the other: those of i are list[begin[i]] to list[begin[i + 1]].
struct Coverings {
  const Covering* list;
  const int32_t* begin;
};

// Outputs of a task: less is not worth another thread.
constexpr int64_t kPoolGrain = 32 * 1024;

#undef FASTCV_POOL_INLINE

}  // namespace fastcv
