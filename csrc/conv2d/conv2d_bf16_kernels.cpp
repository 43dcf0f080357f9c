// The matrix product of bfloat16 operands with sums in float32: see conv2d_gemm.h. Maps stay float32 in memory; the
// input of a block is rounded when it is copied, weights when they are prepared. On processors with AVX512-BF16 one
// instruction does two multiply-adds for each lane: twice the speed of float32.
#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {
constexpr bool kPairs = true, kTiles = false;
}
}  // namespace fastcv::FASTCV_ISA

#include "conv2d_gemm_row.h"
#include "conv2d_gemm.h"

namespace fastcv::FASTCV_ISA {
FASTCV_GEMM(conv2d_bf16)
}  // namespace fastcv::FASTCV_ISA
