// From a program and the sizes of its inputs to a plan: extents, places, kernels.
#include <algorithm>

#include "program.h"
#include "run.h"

namespace fastcv::program {
namespace {

#define FASTCV_STEP(name) StepKernel{#name, FASTCV_PICK(step_##name##_tasks), FASTCV_PICK(step_##name)}

StepKernel step_kernel(Op op, bool indices = false) {
  switch (op) {
    case Op::max_pool: return indices ? FASTCV_STEP(max_pool_indices) : FASTCV_STEP(max_pool);
    case Op::avg_pool: return FASTCV_STEP(avg_pool);
    case Op::adaptive_avg_pool: return FASTCV_STEP(adaptive_avg_pool);
    case Op::add:
    case Op::merge: return FASTCV_STEP(add);
    case Op::mul: return FASTCV_STEP(mul);
    case Op::activate: return FASTCV_STEP(activate);
    case Op::affine: return FASTCV_STEP(affine);
    case Op::interleave: return FASTCV_STEP(interleave);
    case Op::flatten: return FASTCV_STEP(flatten);
    case Op::resize: return FASTCV_STEP(resize);
    case Op::layer_norm: return FASTCV_STEP(layer_norm);
    case Op::prelu: return FASTCV_STEP(prelu);
    case Op::max_unpool: return FASTCV_STEP(max_unpool);
    default: return FASTCV_STEP(copy);
  }
}

}  // namespace

const float* Program::prepared(const Step& s, const Conv2dKernel& kernel, const Conv2dShape& shape) {
  if (std::string("gemv") == kernel.name) return s.weight(*this, 0);  // read where it lies
  const std::lock_guard lock(mutex_);
  auto& kept = prepared_[{&kernel, s.weights[0], s.weights[2], shape.groups}];
  if (!kept) {
    kept = blocks_.allocate(kernel.weights(shape));
    kernel.prepare(shape, s.weight(*this, 0), s.weight(*this, 2), kept);
  }
  return kept;
}

const float* Program::prepared(const Step& s, const ConvTranspose2dPlan& plan, const Conv2dShape& shape) {
  if (plan.reads_in_place()) return s.weight(*this, 0);
  std::vector<int64_t> geometry(s.params.begin(), s.params.begin() + 9);
  if (shape.dilation_h == 1 && shape.dilation_w == 1) std::fill_n(geometry.begin() + 2, 4, 0);  // all paddings alike
  const std::lock_guard lock(mutex_);
  auto& kept = transposed_[{plan.kernel(), s.weights[0], s.weights[2], geometry}];
  if (!kept) {
    kept = blocks_.allocate(plan.weights());
    plan.prepare({s.weight(*this, 0), s.weight(*this, 2)}, kept);
  }
  return kept;
}

namespace {

PlannedStep choose_kernel(Program& program, const Plan& plan, size_t number, int64_t threads) {
  PlannedStep planned{number};
  const Step& step = program.steps[number];
  if (step.op == Op::conv) {
    planned.shape = conv_shape(program, step, plan.extents);
    planned.shape.threads = threads;
    planned.conv = conv2d_kernel("auto", planned.shape, program.precision);
  } else if (step.op == Op::conv_transpose) {
    planned.shape = transposed_shape(program, step, plan.extents);
    planned.shape.threads = threads;
    TransposedKernel kernel = conv_transpose2d_kernel("auto", planned.shape, program.precision);
    if (kernel == TransposedKernel::torch) kernel = TransposedKernel::merged;  // there is no torch here
    planned.transposed = std::make_shared<const ConvTranspose2dPlan>(planned.shape, kernel);
  } else {
    planned.other = step_kernel(step.op, step.op == Op::max_pool && step.params[8]);
  }
  return planned;
}

}  // namespace

Plan make_plan(Program& program, const std::vector<Extent>& inputs, int64_t threads) {
  Plan plan;
  plan.extents = inputs;
  plan.extents.resize(size_t(program.values));
  for (const Step& step : program.steps) plan.extents[size_t(step.output)] = output_extent(program, step, plan.extents);
  for (size_t i = 0; i < program.steps.size(); ++i) plan.steps.push_back(choose_kernel(program, plan, i, threads));
  find_packed(program, plan);
  find_chains(program, plan, threads);
  find_weights(program, plan, threads);
  place_values(program, plan);
  cut_into_bands(program, plan, threads);
  cut_into_parts(plan);
  for (PlannedStep& planned : plan.steps) {
    if (planned.copy_from >= 0) planned.other = step_kernel(Op::cat);
    plan.scratch = std::max(plan.scratch, planned.conv         ? planned.conv->scratch(planned.shape)
                                          : planned.transposed ? planned.transposed->scratch()
                                                               : 0);
    const BoundStep bound = bind_step(program, plan, planned, Pointers{});
    planned.tasks = planned.transient.makes ? preparation_tasks(planned)
                    : planned.conv       ? planned.conv->tasks(planned.shape)
                    : planned.transposed ? planned.transposed->tasks()
                                         : planned.other.tasks(bound.task);
    const Extent& in =
        plan.extents[size_t(planned.copy_from >= 0 ? planned.copy_from : program.steps[planned.step].inputs[0])];
    if (in.n * in.c * in.h * in.w == 0) planned.tasks = 0;
  }
  return plan;
}

}  // namespace fastcv::program
