// The kernels of conv2d, as a table: which serve a shape, and which of them is chosen.
#pragma once

#include <string>
#include <vector>

#include "conv2d.h"

namespace fastcv {

struct Conv2dKernel {
  int64_t number;  // in fastcv.ops.conv2d.KERNELS
  const char* name;
  int64_t (*weights)(const Conv2dShape&);
  void (*prepare)(const Conv2dShape&, const float*, const float*, float*);
  int64_t (*tasks)(const Conv2dShape&);
  int64_t (*scratch)(const Conv2dShape&);
  void (*run)(const Conv2d&, int64_t, int64_t, float*);
  bool (*serves)(const Conv2dShape&);
};

// How many outputs' prepared weights lie together, those of the next so many after them; 0: those of all do. It is a
// multiple of the panels of every instruction set.
int64_t outputs_prepared_together(const Conv2dKernel& kernel, const Conv2dShape& shape);

// Has "auto" choose a kernel for convolutions of just this shape, whatever their precision allows; null undoes it.
// Measured choices (fastcv.tune) come this way.
void choose_conv2d_kernel(const Conv2dShape& shape, const Conv2dKernel* kernel);

// What may be given up for speed. The default's relative error is at most 1e-5; highest has no Winograd; bfloat16
// rounds operands, where the processor is faster so; fast has Winograd's largest tiles, with relative errors of at most
// 5e-5.
enum class Precision : int64_t { standard, highest, bfloat16, fast };

// The named kernel, or for "auto" the one that is fastest on the shape; null where none serves it.
const Conv2dKernel* conv2d_kernel(int64_t number, const Conv2dShape& shape);
const Conv2dKernel* conv2d_kernel(const std::string& name, const Conv2dShape& shape,
                                  Precision precision = Precision::standard);

// What Winograd's tiles of patch x patch input pixels cost, in products of one pair of channels.
double winograd_cost(const Conv2dShape& shape, int64_t patch);

// What errors of is_valid_window say.
constexpr const char* kValidWindow =
    "stride, dilation: expected positive numbers, padding: numbers that are not negative, all and the reach of the "
    "kernel below 2^31";

// Whether kernel, stride, padding and dilation, and the size of the input, are numbers that can be computed with.
bool is_valid_window(const Conv2dShape& shape);

// Output sizes from the others, of a valid window; false where the padded input is smaller than the kernel.
bool set_output_size(Conv2dShape& shape);

}  // namespace fastcv
