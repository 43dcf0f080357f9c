#include "run.h"

#include <algorithm>
#include <thread>

#if defined(FASTCV_X86)
#include <immintrin.h>
#endif

namespace fastcv::program {
namespace {

constexpr int64_t kMostPortions = 16;

void pause_cpu() {
#if defined(FASTCV_X86)
  _mm_pause();
#endif
}

PixelMap<float> place_map(const Plan& plan, const Pointers& pointers, int64_t value) {
  const Place& place = plan.places[size_t(value)];
  const Extent& e = plan.extents[size_t(value)];
  if (place.kind == Place::Kind::input) {
    if (pointers.inputs.empty()) return {};
    PixelMap<const float> map = pointers.inputs[size_t(place.number)];
    return {const_cast<float*>(map.data) + place.channel, map.stride_n, map.stride_y, map.stride_x};
  }
  float* base = place.kind == Place::Kind::arena ? pointers.arena + place.offset
                : pointers.outputs.empty()       ? nullptr
                                                 : pointers.outputs[size_t(place.number)];
  return {base + place.channel, e.h * e.w * place.channels, e.w * place.channels, place.channels,
          plan.packed[size_t(value)]};
}

PixelMap<const float> read_only(const PixelMap<float>& map) {
  return {map.data, map.stride_n, map.stride_y, map.stride_x, map.packed};
}

// A map of vectors as one image, a vector to a pixel.
PixelMap<float> as_image(const PixelMap<float>& map) { return {map.data, 0, 0, map.stride_n, map.packed}; }

template <class T>
void move_to(PixelMap<T>& map, const PlannedStep::Band& band, int64_t row) {
  map.data += band.image * map.stride_n + row * map.stride_y;
}

Conv2d bind_conv(const Program& program, const Plan& plan, const PlannedStep& planned, const Pointers& pointers) {
  const Step& step = program.steps[planned.step];
  const Extent& in = plan.extents[size_t(step.inputs[0])];
  const bool vectors = !planned.transposed && in.h == 1 && in.w == 1 && planned.shape.kernel_h == 1 &&
                       planned.shape.kernel_w == 1 && planned.shape.images == 1 && planned.shape.width == in.n;
  Conv2d conv{};
  const auto map = [&](int64_t value) {
    const PixelMap<float> m = place_map(plan, pointers, value);
    return vectors ? as_image(m) : m;
  };
  conv.shape = planned.shape;
  conv.weight = planned.weight ? planned.weight : pointers.arena + planned.transient.offset;
  if (planned.weight == step.weight(program, 0)) conv.output_scale = step.weight(program, 2);  // read where they lie
  conv.input = read_only(map(step.inputs[0]));
  conv.output = map(step.output);
  if (step.inputs.size() > 1) conv.residual = read_only(map(step.inputs[1]));
  if (planned.band.images) {
    move_to(conv.input, planned.band, planned.band.in_row);
    move_to(conv.output, planned.band, planned.band.out_row);
    if (conv.residual.data) move_to(conv.residual, planned.band, planned.band.out_row);
  }
  conv.bias = step.weight(program, 1);
  if (const int64_t first = planned.transient.first_output) {
    conv.output.data += first;
    if (conv.residual.data) conv.residual.data += first;
    if (conv.bias) conv.bias += first;
  }
  conv.input_scale = step.weight(program, 3), conv.input_shift = step.weight(program, 4);
  const size_t activation = planned.transposed ? 9 : 7;
  conv.activation = Activation(step.params[activation]), conv.slope = float(step.real(activation + 1));
  return conv;
}

StepTask bind_other(const Program& program, const Plan& plan, const PlannedStep& planned, const Pointers& pointers) {
  const Step& step = program.steps[planned.step];
  StepTask t{};
  t.in = plan.extents[size_t(step.inputs[0])], t.out = plan.extents[size_t(step.output)];
  t.a = read_only(place_map(plan, pointers, step.inputs[0]));
  t.y = place_map(plan, pointers, step.output);
  if (step.inputs.size() > 1) {
    t.in2 = plan.extents[size_t(step.inputs[1])];
    t.b = read_only(place_map(plan, pointers, step.inputs[1]));
  }
  t.scale = step.weight(program, 0), t.shift = step.weight(program, 1);
  for (size_t i = 0; i < step.params.size() && i < 9; ++i) t.p[i] = step.params[i];
  if (step.op == Op::add || step.op == Op::mul || step.op == Op::merge || step.op == Op::activate ||
      step.op == Op::affine)
    t.activation = Activation(step.params[0]), t.slope = float(step.real(1));
  if (planned.band.images) {  // of pooling
    move_to(t.a, planned.band, planned.band.in_row);
    move_to(t.y, planned.band, planned.band.out_row);
    t.in.n = t.out.n = planned.band.images;
    t.in.h -= planned.band.in_row, t.out.h = planned.band.out_rows, t.p[4] = planned.band.pad_h;
  }
  if (step.op == Op::layer_norm) t.eps = float(step.real(0));
  if (step.op == Op::resize) {
    const bool corners = step.params[1] != 0, factors = step.params[2] == 2;
    const auto ratio = [&](int64_t from, int64_t to, size_t factor) {
      if (corners) return to > 1 ? float(from - 1) / float(to - 1) : 0.0f;
      return factors ? float(1.0 / step.real(factor)) : float(from) / float(to);
    };
    t.ratio_h = ratio(t.in.h, t.out.h, 5), t.ratio_w = ratio(t.in.w, t.out.w, 6);
  }
  return t;
}

StepTask bind_copy(const Plan& plan, const PlannedStep& planned, const Pointers& pointers) {
  StepTask t{};
  t.in = t.out = plan.extents[size_t(planned.copy_from)];
  t.a = read_only(place_map(plan, pointers, planned.copy_from));
  if (planned.copy_to >= 0) {
    t.y = place_map(plan, pointers, planned.copy_to);
    t.y.data += planned.copy_channel;
  } else {
    float* base = pointers.outputs.empty() ? nullptr : pointers.outputs[size_t(planned.copy_output)];
    t.y = {base, t.out.h * t.out.w * t.out.c, t.out.w * t.out.c, t.out.c};
  }
  return t;
}

}  // namespace

BoundStep bind_step(const Program& program, const Plan& plan, const PlannedStep& planned, const Pointers& pointers) {
  BoundStep bound{&planned, {}, {}, {}};
  if (planned.transient.makes) {
    const Step& step = program.steps[planned.step];
    bound.preparation = {step.weight(program, 0), step.weight(program, 2), pointers.arena + planned.transient.offset,
                         plan.extents[size_t(step.output)].c};
  } else if (planned.conv || planned.transposed)
    bound.conv = bind_conv(program, plan, planned, pointers);
  else if (planned.copy_from >= 0)
    bound.task = bind_copy(plan, planned, pointers);
  else
    bound.task = bind_other(program, plan, planned, pointers);
  return bound;
}

void Run::start(const Program& program, const Plan& plan, const Pointers& pointers, int64_t threads) {
  steps.clear();
  for (const PlannedStep& planned : plan.steps) steps.push_back(bind_step(program, plan, planned, pointers));
  portions = std::min(threads, kMostPortions);
  counters = std::make_unique<Counter[]>(steps.size() * size_t(portions + 1));
  arrived = 0;
}

void Run::work_step(const BoundStep& step, Counter* counter, int64_t own, float* scratch) {
  const PlannedStep& planned = *step.planned;
  std::atomic<int64_t>& done = counter->value;
  each_claimed(planned.tasks, portions, own, counter + 1, [&](int64_t task) {
    if (planned.transient.makes)
      step.preparation.run(planned, task);
    else if (planned.conv)
      planned.conv->run(step.conv, task, task + 1, scratch);
    else if (planned.transposed)
      planned.transposed->run(step.conv, task, task + 1, scratch);
    else
      planned.other.run(step.task, task, task + 1);
    done.fetch_add(1, std::memory_order_release);
  });
  for (int spins = 0; done.load(std::memory_order_acquire) < planned.tasks; ++spins) {
    pause_cpu();
    if (spins > 20000) std::this_thread::yield();  // another needs this processor
  }
}

void Run::work(float* scratch) {
  const int64_t me = arrived.fetch_add(1);
  const bool times = !nanoseconds.empty() && me == 0;
  auto before = std::chrono::steady_clock::now();
  for (size_t i = 0; i < steps.size(); ++i) {
    work_step(steps[i], &counters[i * size_t(portions + 1)], me % portions, scratch);
    if (times) {
      const auto now = std::chrono::steady_clock::now();
      nanoseconds[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
      before = now;
    }
  }
}

}  // namespace fastcv::program
