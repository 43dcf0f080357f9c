// Conversions between the storage types and those of arithmetic, one element at a time: for kernels of every
// instruction set, and for CUDA, whose namespace is fastcv::cuda.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTCV_SCALAR __host__ __device__ __forceinline__
#else
#define FASTCV_SCALAR inline __attribute__((always_inline))
#if defined(__F16C__)
#include <immintrin.h>
#endif
#endif

namespace fastcv::FASTCV_ISA {
FASTCV_SCALAR float to_accumulate(float x) { return x; }
FASTCV_SCALAR double to_accumulate(double x) { return x; }
FASTCV_SCALAR float to_accumulate(bfloat16_t x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
FASTCV_SCALAR float to_accumulate(half_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__half_raw{x.bits}));
#elif defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place; the multiplication by 2^112 rebuilds normal and subnormal numbers alike.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  float y;
  memcpy(&y, &rest, 4);
  y *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits = rest | 0x7f800000;
  bits |= sign;
  memcpy(&y, &bits, 4);
  return y;
#endif
}
FASTCV_SCALAR void from_accumulate(float x, float* y) { *y = x; }
FASTCV_SCALAR void from_accumulate(double x, double* y) { *y = x; }
FASTCV_SCALAR void from_accumulate(float x, bfloat16_t* y) {  // round to nearest even
#if defined(__CUDA_ARCH__)
  y->bits = __nv_bfloat16_raw(__float2bfloat16_rn(x)).x;
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
FASTCV_SCALAR void from_accumulate(float x, half_t* y) {
#if defined(__CUDA_ARCH__)
  y->bits = __half_raw(__float2half_rn(x)).x;
#elif defined(__F16C__)
  y->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  // Let the float adder round: adding a power of two 13 bits above x's own leaves just half's mantissa.
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    y->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x47800000) {  // 65536 and above, infinity
    y->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: subnormal in half
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t r;
    memcpy(&r, &m, 4);
    y->bits = uint16_t(sign | (r - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    y->bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  }
#endif
}

}  // namespace fastcv::FASTCV_ISA
