// A static part of a network as a list of steps, run in one call: no Python and no dispatcher between layers, memory
// planned once for each shape of the inputs.
//
//     Program    what is computed: steps over numbered values, with weights. Knows no sizes.
//     Plan       a program for inputs of certain sizes: the extent and place of every value, the kernel of every step.
//     bind, run  a plan with pointers: threads go through the steps together (run.h).
//
// Values are float32 maps, channels-last; vectors [N, C] are maps of one pixel. Between kernels that round their
// operands to bfloat16 maps are packed (packed.cpp). This is the pointer world, without torch.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../conv2d/conv2d_kernels.h"
#include "../conv_transpose2d/conv_transpose2d_plan.h"
#include "steps.h"
#include "weight_blocks.h"

namespace fastcv::program {

// Numbers are those of fastcv.accelerate._program.OPS.
enum class Op : int64_t {
  conv,               // input, [residual]; weight, [bias], [scale of outputs], [scale, shift of inputs]
  max_pool,           // input; with indices these are bytes behind the channels of each pixel
  avg_pool,           // input
  adaptive_avg_pool,  // input
  add,                // two inputs of one size, or the second of one pixel
  mul,                // the same
  activate,           // input
  affine,             // input; scale, shift: one for each channel
  cat,                // any number of inputs, joined along channels
  interleave,         // two inputs of as many channels: channels of both in turn
  slice,              // input: some of its channels
  flatten,            // input [N, C, H, W] to [N, C * H * W], in this order
  resize,             // input, [like]: nearest or bilinear
  layer_norm,         // input; scale, shift, over the channels of each pixel
  prelu,              // input; slope of each channel
  conv_transpose,     // input, [residual]; weight, [bias], [scale of outputs]
  max_unpool,         // input, indices, what was pooled, [like]; of the last two only the size is read
  merge,              // two inputs: the first and the second resized to its size (nearest), added
};

struct Step {
  Op op;
  std::vector<int64_t> inputs;  // values
  int64_t output;
  std::vector<int64_t> params;   // by Op, see shapes.cpp; floating ones as the bits of a double
  std::vector<int64_t> weights;  // numbers of weights, -1: none

  double real(size_t i) const;
  const float* weight(const struct Program& program, size_t i) const;  // null: none
  // Whether input i is read, and not just asked for its size.
  bool reads(size_t i) const { return !(op == Op::resize && i == 1) && !(op == Op::max_unpool && i >= 2); }
};

struct Weight {
  const float* data;
  std::vector<int64_t> size;
};

struct Program {
  Precision precision = Precision::standard;
  bool low_memory = false;  // weights are made at each run where that pays (weights.cpp)
  int64_t inputs = 0, values = 0;  // values 0 .. inputs are what it is called with
  std::vector<int64_t> outputs;
  std::vector<Step> steps;
  std::vector<Weight> weights;

  // Prepared weights of a step for a kernel, made when first asked for.
  const float* prepared(const Step& step, const Conv2dKernel& kernel, const Conv2dShape& shape);
  const float* prepared(const Step& step, const ConvTranspose2dPlan& plan, const Conv2dShape& shape);

 private:
  std::mutex mutex_;
  WeightBlocks blocks_;
  // By kernel, weight, scale and groups: a layer that is used twice is prepared once.
  std::map<std::tuple<const Conv2dKernel*, int64_t, int64_t, int64_t>, float*> prepared_;
  // Of transposed convolutions, by kernel, weight, scale and what the step says of its geometry.
  std::map<std::tuple<TransposedKernel, int64_t, int64_t, std::vector<int64_t>>, float*> transposed_;
};

// Where the pixels of a value lie: in a buffer that is `channels` wide, from `channel` on.
struct Place {
  enum class Kind { arena, input, output } kind = Kind::arena;
  int64_t number = 0;  // of the input or output
  int64_t offset = 0;  // in the arena, in floats
  int64_t channel = 0, channels = 0;
};

// A convolution, another step, or a copy of a value to its place in another (a cat that could not be avoided) or in an
// output (of a value that lies elsewhere).
struct PlannedStep {
  size_t step;  // of the program
  const Conv2dKernel* conv = nullptr;
  Conv2dShape shape{};
  std::shared_ptr<const ConvTranspose2dPlan> transposed;  // of a transposed convolution
  const float* weight = nullptr;                          // prepared, null where they are made at each run
  StepKernel other{};
  int64_t copy_from = -1, copy_to = -1, copy_channel = 0, copy_output = -1;
  int64_t tasks = 0;
  // Some rows of some images (bands.cpp), from in_row on in the input, of which there are pad_h above; no images: all.
  struct Band {
    int64_t image = 0, images = 0, in_row = 0, out_row = 0, out_rows = 0, pad_h = 0;
  } band{};
  // Of weights that are made at each run (weights.cpp): how many floats for how many outputs, and where in the arena.
  // The step falls into parts of that many outputs, from first_output on; before each comes one that makes its weights.
  struct Transient {
    int64_t floats = 0, outputs = 0, offset = 0, first_output = 0;
    bool makes = false;
  } transient{};
};

// Steps of the program that run together, band by band: from the first to the last of a chain.
struct Span {
  size_t first, last;
};

struct Plan {
  std::vector<Extent> extents;  // of values
  std::vector<bool> packed;
  std::vector<Place> places;
  std::vector<Span> spans;         // of the program's steps
  std::vector<PlannedStep> steps;  // one for every step of the program until values have places, then those that run
  int64_t arena = 0, scratch = 0;  // floats; scratch is each thread's
};

// Throw std::invalid_argument where sizes do not fit.
Extent output_extent(const Program& program, const Step& step, const std::vector<Extent>& extents);
// The shape of a convolution for one thread.
Conv2dShape conv_shape(const Program& program, const Step& step, const std::vector<Extent>& extents);
Conv2dShape transposed_shape(const Program& program, const Step& step, const std::vector<Extent>& extents);
// Sets packed; kernels are chosen, as they are for what follows.
void find_packed(const Program& program, Plan& plan);
// Elements of a pixel of a value.
int64_t pixel_elements(const Plan& plan, int64_t value);
// Sets spans.
void find_chains(const Program& program, Plan& plan, int64_t threads);
// Sets weights of convolutions, or how they are made at each run.
void find_weights(Program& program, Plan& plan, int64_t threads);
// Sets places and arena; steps lose those that are views and gain the copies that are needed.
void place_values(const Program& program, Plan& plan);
// Replaces the steps of each chain by those of its bands.
void cut_into_bands(const Program& program, Plan& plan, int64_t threads);
// Replaces the steps whose weights are made at each run by their parts.
void cut_into_parts(Plan& plan);
Plan make_plan(Program& program, const std::vector<Extent>& inputs, int64_t threads);

}  // namespace fastcv::program
