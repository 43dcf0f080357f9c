// The matrix product in float32: see conv2d_gemm.h.
#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {
constexpr bool kPairs = false, kTiles = false;
}
}  // namespace fastcv::FASTCV_ISA

#include "conv2d_gemm_row.h"
#include "conv2d_gemm.h"

namespace fastcv::FASTCV_ISA {
FASTCV_GEMM(conv2d_gemm)
}  // namespace fastcv::FASTCV_ISA
