// Gram matrices: half of a matrix product, because the result is symmetric.
//
// Channels go in blocks of a vector's lanes, and only block pairs (i, j >= i) are summed: C / L * (C / L + 1) / 2 of (C
// / L)^2, 53 % for 256 channels on AVX-512. A chunk of positions is packed, [block][position][lane], and serves as rows
// and as columns of the product, so that both memory formats and all types become one case. The features are read from
// memory once, and nothing of their size is written: chunk times channels are at most 512 KB, for the second-level
// cache.
//
// A tile is R rows of block i (a broadcast each) by up to three blocks j: 8 x 3 multiply-adds for 11 loads on AVX-512,
// bound by arithmetic. Block i and three of columns (8 KB each) stay in the first-level cache for both tiles of a block.
// Sums return to memory between chunks, 24 vectors for 128 * 24 multiply-adds. The next chunk is fetched meanwhile. On
// a Xeon with two multiply-adds a cycle, against torch's bmm: 64 to 256 channels 1.43, 1.56, 1.62 times before (6 x 4,
// chunks of 256), 1.77, 1.70, 1.68 now; fetching ahead with 512 channels takes 5 % longer.
//
// 256 channels of 256 x 256 positions: 4.6 G multiply-adds, 20 ms on two cores of 115 GFLOP/s; 67 MB, 4 ms.
//
// The depth is cut into splits, which tasks sum apart and gram_finish adds in order; where there are too few positions
// for that, tasks share the rows of blocks, and pack again what they share. Both follow from the shape alone. The loops
// are in gram_matrix_sum.h, which gram_matrix_bf16_kernels.cpp has as well.
#include "gram_matrix_sum.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kPackedBytes = 512 * 1024, kMostChunk = 128, kLeastChunk = 32;
constexpr int64_t kTasks = 16;                        // that serve so many threads; more pack the same more often
constexpr int64_t kLeastSplit = 512;                  // positions; below, sums cost more to add than to make
constexpr int64_t kSumsBytes = int64_t(16) << 20;     // of all splits

}  // namespace

template <class T>
GramPlan gram_plan(int64_t images, int64_t channels, int64_t positions) {
  constexpr int64_t L = kLanes<Acc<T>>, kBytes = sizeof(Acc<T>);
  GramPlan plan{images, channels, positions, ceil_div(channels, L), 1, positions, 1, kMostChunk};
  const int64_t row_bytes = max_of(1, plan.blocks) * L * kBytes, matrix_bytes = row_bytes * max_of(1, plan.blocks) * L;
  plan.chunk = max_of(kLeastChunk, min_of(kMostChunk, kPackedBytes / row_bytes));
  const int64_t affordable = kSumsBytes / max_of(1, matrix_bytes * images);
  const int64_t wanted = min_of(ceil_div(kTasks, max_of(1, images)), min_of(affordable, positions / kLeastSplit));
  // Splits of whole chunks.
  plan.split_positions = ceil_div(ceil_div(positions, max_of(1, wanted)), plan.chunk) * plan.chunk;
  plan.splits = max_of(1, ceil_div(positions, max_of(1, plan.split_positions)));
  plan.groups = max_of(1, min_of(ceil_div(kTasks, max_of(1, images * plan.splits)), plan.blocks / kGramVectors));
  return plan;
}

template <class T>
int64_t gram_sums(const GramPlan& plan) {
  const int64_t rows = plan.blocks * kLanes<Acc<T>>;
  return plan.images * plan.splits * rows * rows;
}

template <class T>
int64_t gram_scratch(const GramPlan& plan) {
  return plan.blocks * block_step<T>(plan);
}

template <class T>
void gram_sum(const FeatureMap<const T>& map, const GramPlan& plan, int64_t begin, int64_t end, Acc<T>* sums,
              Acc<T>* scratch) {
  sum_tasks<false>(map, plan, begin, end, sums, scratch);
}

// ---- from sums to matrices ------------------------------------------------------------------------------------------

namespace {

template <class A>
FASTCV_INLINE double sum_of_squares(Vec<A> x) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += double(x[i]) * double(x[i]);
  return sum;
}

// One line of a block: scale * sums (minus the target) to the matrix.
template <class O>
FASTCV_INLINE double finish_line(Vec<Acc<O>> line, O* to, const O* target, int n) {
  if (!target) {
    if (n == kLanes<Acc<O>>)
      store(to, line);
    else
      store_first(to, line, n);
    return 0;
  }
  const Vec<Acc<O>> difference = line - load_first(target, n);
  store_first(to, difference, n);
  Vec<Acc<O>> counted = difference;
  for (int i = n; i < kLanes<Acc<O>>; ++i) counted[i] = 0;
  return sum_of_squares<Acc<O>>(counted);
}

}  // namespace

template <class T, class O>
void gram_finish(const GramFinish<T, O>& task, const GramPlan& plan, int64_t begin, int64_t end, double* squares) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t rows = plan.blocks * L, channels = plan.channels;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t image = t / plan.blocks, i = t % plan.blocks;
    const int height = int(min_of(L, channels - i * L));
    O* const gram = task.gram + image * channels * channels;
    const O* const target = task.target ? task.target + image * task.target_stride_n : nullptr;
    double sum = 0;
    for (int64_t j = i; j < plan.blocks; ++j) {
      const int width = int(min_of(L, channels - j * L));
      Vec<Acc<T>> block[L];
      for (int r = 0; r < L; ++r) {
        const Acc<T>* from = task.sums + image * plan.splits * rows * rows + (i * L + r) * rows + j * L;
        block[r] = load(from);
        for (int64_t s = 1; s < plan.splits; ++s) block[r] += load(from + s * rows * rows);
        block[r] *= task.scale;
      }
      for (int r = 0; r < height; ++r) {
        const int64_t at = (i * L + r) * channels + j * L;
        sum += finish_line(block[r], gram + at, target ? target + at : nullptr, width);
      }
      if (j == i) continue;
      transpose(block);
      for (int r = 0; r < width; ++r) {
        const int64_t at = (j * L + r) * channels + i * L;
        sum += finish_line(block[r], gram + at, target ? target + at : nullptr, height);
      }
    }
    if (task.target) squares[t] = sum;
  }
}

#define FASTCV_INSTANTIATE(T)                                                                                       \
  template GramPlan gram_plan<T>(int64_t, int64_t, int64_t);                                                        \
  template int64_t gram_sums<T>(const GramPlan&);                                                                   \
  template int64_t gram_scratch<T>(const GramPlan&);                                                                \
  template void gram_sum<T>(const FeatureMap<const T>&, const GramPlan&, int64_t, int64_t, Acc<T>*, Acc<T>*);       \
  template void gram_finish<T, T>(const GramFinish<T, T>&, const GramPlan&, int64_t, int64_t, double*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)
// Style losses of half types keep their differences in float.
template void gram_finish<half_t, float>(const GramFinish<half_t, float>&, const GramPlan&, int64_t, int64_t, double*);
template void gram_finish<bfloat16_t, float>(const GramFinish<bfloat16_t, float>&, const GramPlan&, int64_t, int64_t,
                                             double*);

}  // namespace fastcv::FASTCV_ISA
