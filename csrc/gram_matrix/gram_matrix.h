// Gram matrices of feature maps (Gatys, Ecker, Bethge, "Image style transfer using convolutional neural networks", CVPR
// 2016, equation 3): G = scale * F F^T for the channels F [C, H * W] of each image. Style losses are made of them.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/feature_map.h"
#include "../common/types.h"

namespace fastcv {

// How the sums of one call are divided: by the shape alone, so that they do not depend on the number of threads.
struct GramPlan {
  int64_t images, channels, positions;
  int64_t blocks;                   // of kLanes channels
  int64_t splits, split_positions;  // of the depth, each summed apart
  int64_t groups;                   // of rows of blocks
  int64_t chunk;                    // positions that are packed at a time
  int64_t tasks() const { return images * splits * groups; }
};

// The last step: sums to a matrix [C, C], or to its difference from a target.
template <class T, class O>
struct GramFinish {
  const accumulate_t<T>* sums;  // of all images
  accumulate_t<T> scale;
  O* gram;          // [N, C, C]
  const O* target;  // [N, C, C] or [C, C], or null
  int64_t target_stride_n;
};

// grad_features = symmetric * features.
template <class T>
struct GramBackward {
  FeatureMap<const T> features;      // contiguous or channels-last, as one row: height 1
  FeatureMap<T> output;              // the same
  bool channels_last;
  const accumulate_t<T>* symmetric;  // scale * (grad + grad^T) of all images, as gram_symmetrize lays it out
  int64_t symmetric_stride_n;
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    template <class T> GramPlan gram_plan(int64_t images, int64_t channels, int64_t positions);
    template <class T> int64_t gram_sums(const GramPlan& plan);     // elements, of all images
    template <class T> int64_t gram_scratch(const GramPlan& plan);  // elements, of a task
    // Tasks begin <= t < end: the map has height 1, or positions are read row by row.
    template <class T> void gram_sum(const FeatureMap<const T>& map, const GramPlan& plan, int64_t begin, int64_t end,
                                     accumulate_t<T>* sums, accumulate_t<T>* scratch);
    // The same for words of two bfloat16 numbers, neighbours of a channel; the plan is of float32 and so many words.
    void gram_sum_pairs(const FeatureMap<const float>& map, const GramPlan& plan, int64_t begin, int64_t end,
                        float* sums, float* scratch);
    // The same in the processor's tiles, with its own scratch.
    void gram_sum_tiles(const FeatureMap<const float>& map, const GramPlan& plan, int64_t begin, int64_t end,
                        float* sums, float* scratch);
    int64_t gram_sum_tiles_scratch(const GramPlan& plan);
    // Rows of blocks begin <= i < end of images * blocks; squares[i] is the sum of squares of what was written for it,
    // where there is a target.
    template <class T, class O> void gram_finish(const GramFinish<T, O>& task, const GramPlan& plan, int64_t begin,
                                                 int64_t end, double* squares);
    // scale * (grad + grad^T) in the layout that gram_backward reads, rows begin <= i < end of it, and its number of
    // elements for an image.
    template <class A> int64_t gram_symmetric_size(int64_t channels, bool channels_last);
    template <class A> void gram_symmetrize(const A* grad, int64_t channels, A scale, bool channels_last, A* to,
                                            int64_t begin, int64_t end);
    template <class T> int64_t gram_backward_tasks(const GramBackward<T>& task);
    template <class T> int64_t gram_backward_scratch(const GramBackward<T>& task);
    template <class T> void gram_backward(const GramBackward<T>& task, int64_t begin, int64_t end,
                                          accumulate_t<T>* scratch);)
