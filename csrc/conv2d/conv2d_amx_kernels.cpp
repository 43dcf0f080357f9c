// The matrix product of bfloat16 operands in the processor's tiles, with sums in float32: see conv2d_gemm.h. Maps stay
// float32 in memory, as for conv2d_bf16_kernels.cpp.
#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {
constexpr bool kPairs = true, kTiles = true;
}
}  // namespace fastcv::FASTCV_ISA

#include "conv2d_amx_row.h"
#include "conv2d_gemm.h"

namespace fastcv::FASTCV_ISA {
// Where runs of the depth fall into equal tiles: see run_panels.
bool conv2d_amx_serves(const Conv2dShape& s) {
  const bool whole_rows = !make_plan(s).flat && s.dilation_w == 1;
  return tile_words(whole_rows ? s.kernel_w * words(s) : words(s)) > 0;
}
FASTCV_GEMM(conv2d_amx)
}  // namespace fastcv::FASTCV_ISA
