// Gram matrices of bfloat16 features without widening them: see gram_matrix_kernels.cpp. Positions are summed in pairs,
// two neighbours of a channel, which lie in one word of 32 bits where the features are contiguous. So a map of words
// with half the positions is packed as one of float32 would be, and one instruction does two multiply-adds for each
// lane: exact products, sums in float32, subnormal numbers as zero. That is twice the speed of float32, for half the
// bytes.
//
// Bound by arithmetic: 256 channels of 128 x 128 take 6.6 ms of one core, 12.6 ms widened.
//
// Called where the processor has AVX512-BF16 (bf16_products in cpu_isa.h).
#include "gram_matrix_sum.h"

namespace fastcv::FASTCV_ISA {

void gram_sum_pairs(const FeatureMap<const float>& map, const GramPlan& plan, int64_t begin, int64_t end, float* sums,
                    float* scratch) {
  sum_tasks<true>(map, plan, begin, end, sums, scratch);
}

}  // namespace fastcv::FASTCV_ISA
