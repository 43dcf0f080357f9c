// Which values are packed: two channels in bfloat16 where one in float32 would be, so that memory gives and takes half.
// Where a program may round operands, a kernel that does would round what another writes anyway: stored rounded it is
// the same to the bit. Only residuals and other sums are rounded where they were not.
//
// Packed is what one such kernel, a maximum or a sum writes and only such read. What goes in and out of the program is
// float32.
//
// Measured (2 cores of a Xeon with AMX): R50-FPN backbone at 800 x 1088, 149 to 134 ms.
#include <algorithm>

#include "program.h"

namespace fastcv::program {
namespace {

bool reads_and_writes_packed(const PlannedStep& planned, const Step& step) {
  if (step.op == Op::add || step.op == Op::merge || (step.op == Op::max_pool && !step.params[8])) return true;
  const Conv2dShape& s = planned.shape;
  return planned.conv && std::string("amx") == planned.conv->name && !s.input_norm && s.group_channels() % 2 == 0;
}

}  // namespace

void find_packed(const Program& program, Plan& plan) {
  plan.packed.assign(plan.extents.size(), false);
  if (program.precision != Precision::bfloat16) return;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    plan.packed[size_t(step.output)] =
        reads_and_writes_packed(plan.steps[i], step) && plan.extents[size_t(step.output)].c % 2 == 0;
  }
  for (size_t i = 0; i < program.steps.size(); ++i)
    for (size_t k = 0; k < program.steps[i].inputs.size(); ++k)
      if (program.steps[i].reads(k) && !reads_and_writes_packed(plan.steps[i], program.steps[i]))
        plan.packed[size_t(program.steps[i].inputs[k])] = false;
  for (int64_t value : program.outputs) plan.packed[size_t(value)] = false;
}

int64_t pixel_elements(const Plan& plan, int64_t value) {
  const int64_t channels = plan.extents[size_t(value)].c;
  return plan.packed[size_t(value)] ? channels / 2 : channels;
}

}  // namespace fastcv::program
