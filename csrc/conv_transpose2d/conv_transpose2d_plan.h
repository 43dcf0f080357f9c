// How a transposed convolution is divided into phases, and which kernel computes them.
#pragma once

#include <vector>

#include "../conv2d/conv2d_kernels.h"
#include "conv_transpose2d.h"

namespace fastcv {

// Numbers are those of fastcv.ops.conv_transpose2d.KERNELS. Names of conv2d's kernels: each phase by it where it
// serves, by gemm elsewhere.
enum class TransposedKernel : int64_t {
  gemm,
  winograd,
  depthwise,
  grouped,
  torch,
  winograd_2x2,
  merged,
  bf16,
  pixel,
  winograd_3x3,
  amx,
  pixel_gemv
};

// The named one, or for "auto" the one that is fastest; torch where none serves.
TransposedKernel conv_transpose2d_kernel(const std::string& name, const Conv2dShape& shape,
                                         Precision precision = Precision::standard);

// Each phase is looked at, so there must not be billions.
constexpr int64_t kMostPhases = int64_t(1) << 16;

// Output sizes from the others and these; false where a number is out of range, there are too many phases, or no
// output.
bool set_transposed_output_size(Conv2dShape& shape, int64_t output_padding_h, int64_t output_padding_w);

// Of a layer, [C, K / groups, KH, KW]. Where a plan is of some outputs of one group: from `first` on, of `outputs`.
struct TransposedWeight {
  const float *data, *scale = nullptr;  // scale: [K], of outputs, or null
  int64_t first = 0, outputs = 0;
};

class ConvTranspose2dPlan {
 public:
  ConvTranspose2dPlan(const Conv2dShape& shape, TransposedKernel kernel);

  TransposedKernel kernel() const { return kernel_; }

  // As of a kernel of conv2d. How weights lie depends on kernel, groups, stride and dilation alone; where dilated, also
  // on padding and output padding, of which depends whether Winograd's kernel serves a phase.
  int64_t weights() const { return weights_; }
  void prepare(const TransposedWeight& weight, float* prepared) const;
  // Weights are read where they lie, and none prepared.
  bool reads_in_place() const { return kernel_ == TransposedKernel::pixel_gemv; }
  // So many outputs of a phase are prepared without the others, as those of conv2d's kernels; 0: not in all phases.
  int64_t outputs_prepared_together() const;
  // In tasks that do not meet in memory.
  int64_t preparation_tasks() const;
  void prepare(const TransposedWeight& weight, int64_t task, float* prepared) const;
  int64_t tasks() const { return tasks_; }
  int64_t scratch() const { return scratch_; }
  void run(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) const;

 private:
  enum class Kind { phase, merged, depthwise, gemv };
  struct Part {
    Kind kind;
    PhaseRuns runs;
    int64_t weight = 0;                    // where its weights begin
    int64_t tasks = 0, first = 0;          // first: of its tasks
    const Conv2dKernel* kernel = nullptr;  // of a phase
    Conv2dShape shape{};                   // the convolution that a phase is
    bool one_image = false;                // of images of one pixel, which are the pixels of one
    int64_t skip_y = 0, skip_x = 0;        // input pixels before those that it reads
    int64_t output_y = 0, output_x = 0;    // its first output
  };

  void add_phase(const PhaseRuns& runs, TransposedKernel kernel);
  void add(Part part, int64_t weights, int64_t scratch);
  Conv2d phase_of(const Conv2d& conv, const Part& part) const;
  int64_t preparation_tasks(const Part& part) const;
  void prepare_phase(const Part& part, const TransposedWeight& weight, int64_t task, float* prepared) const;

  Conv2dShape shape_;
  TransposedKernel kernel_;
  std::vector<Part> parts_;
  bool even_ = true;  // all parts have as many tasks
  int64_t weights_ = 0, tasks_ = 0, scratch_ = 0;
};

}  // namespace fastcv
