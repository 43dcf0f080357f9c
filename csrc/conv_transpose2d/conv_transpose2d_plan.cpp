#include "conv_transpose2d_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "../common/window_size.h"

namespace fastcv {
namespace {

// Phases of one axis with the taps that each has; neighbours that read the same input are joined where `join` is set.
std::vector<PhaseRun> phase_runs(int64_t kernel, int64_t stride, int64_t dilation, bool join) {
  const int64_t common = std::gcd(stride, dilation);
  std::vector<PhaseRun> runs;
  for (int64_t r = 0; r < stride; ++r) {
    PhaseRun run{r, 1, 0, 0, dilation / common, 0, stride / common};
    for (int64_t k = 0; k < std::min(kernel, run.kernel_step) && run.taps == 0; ++k)
      if (k * dilation % stride == r) {
        run.taps = (kernel - 1 - k) / run.kernel_step + 1;
        run.base = (r - k * dilation) / stride;  // a whole number, zero or negative
        run.kernel = k;
      }
    if (!runs.empty() && join) {
      PhaseRun& last = runs.back();
      const bool follows = run.kernel == last.kernel + last.count && run.base == last.base;
      if (last.taps == run.taps && (run.taps == 0 || follows)) {
        ++last.count;
        continue;
      }
    }
    runs.push_back(run);
  }
  return runs;
}

bool is_depthwise(const Conv2dShape& s) { return s.groups == s.channels && s.groups == s.out_channels; }

bool is_plain(const Conv2dShape& s) { return s.stride_h == 1 && s.stride_w == 1; }

// Along one axis: the convolution of a phase, with the pad that puts its first output where it belongs.
struct Axis {
  int64_t size, out, kernel, pad, dilation, skip, output;

  Axis(const PhaseRun& run, int64_t stride, int64_t pad_all, int64_t in, int64_t out_all) {
    const BlockRange q(run.first, 1, stride, pad_all, out_all);
    size = in, out = q.end - q.begin, kernel = run.taps, dilation = run.step, skip = 0;
    pad = (run.taps - 1) * run.step - run.base - q.begin;
    output = stride * q.begin + run.first - pad_all;
    if (run.taps == 1 && pad <= 0 && out <= in + pad) skip = -pad, size = out, pad = 0;  // reads just these pixels
    if (run.taps == 1) dilation = 1;
  }
};

// The convolution of one phase, without threads and skips.
Conv2dShape phase_shape(const Conv2dShape& s, const Axis& y, const Axis& x) {
  Conv2dShape p{};
  p.images = s.images, p.channels = s.channels, p.out_channels = s.out_channels, p.groups = s.groups,
  p.threads = s.threads;
  p.height = y.size, p.width = x.size, p.out_height = y.out, p.out_width = x.out;
  p.kernel_h = y.kernel, p.kernel_w = x.kernel, p.pad_h = y.pad, p.pad_w = x.pad;
  p.dilation_h = y.dilation, p.dilation_w = x.dilation, p.stride_h = p.stride_w = 1;
  return p;
}

const Conv2dKernel* phase_kernel(const char* name, const Conv2dShape& shape) {
  const Conv2dKernel* kernel = conv2d_kernel(name, shape);
  return kernel ? kernel : conv2d_kernel("gemm", shape);
}

const char* const kNames[] = {"gemm",         "winograd", "depthwise", "grouped", "torch",
                              "winograd_2x2", "merged",   "bf16",      "pixel",   "winograd_3x3",
                              "amx",          "pixel_gemv"};

constexpr int64_t kLanes = 16, kFewImages = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiply-adds of vectors, of all phases one by one and of phases joined, with what storing a vector takes.
double separate_cost(const Conv2dShape& s) {
  double cost = 0;
  for (const PhaseRun& y : phase_runs(s.kernel_h, s.stride_h, s.dilation_h, false))
    for (const PhaseRun& x : phase_runs(s.kernel_w, s.stride_w, s.dilation_w, false))
      cost += double(s.groups) *
              (double(y.taps * x.taps * s.group_channels() + 4) * double(ceil_div(s.group_outputs(), kLanes)) +
               double(s.group_channels()) / 4);
  return cost;
}

double merged_cost(const Conv2dShape& s) {
  double cost = 0;
  for (const PhaseRun& y : phase_runs(s.kernel_h, s.stride_h, s.dilation_h, true))
    for (const PhaseRun& x : phase_runs(s.kernel_w, s.stride_w, s.dilation_w, true)) {
      const int64_t segments = y.count * (s.groups == 1 ? 1 : x.count), columns = y.count * x.count * s.group_outputs();
      cost += double(s.groups) * (double(y.taps * x.taps * s.group_channels() + 4) * double(ceil_div(columns, kLanes)) +
                                  double(4 * segments) + double(s.group_channels()) / 4);
    }
  return cost;
}

TransposedKernel number_of(const std::string& name) {  // gemm: of kernels that phases have no use for
  for (int64_t i = 0; i < int64_t(std::size(kNames)); ++i)
    if (name == kNames[i]) return TransposedKernel(i);
  return TransposedKernel::gemm;
}

std::vector<Conv2dShape> phase_shapes(const Conv2dShape& s) {
  std::vector<Conv2dShape> shapes;
  for (const PhaseRun& y : phase_runs(s.kernel_h, s.stride_h, s.dilation_h, false))
    for (const PhaseRun& x : phase_runs(s.kernel_w, s.stride_w, s.dilation_w, false))
      if (y.taps > 0 && x.taps > 0)
        shapes.push_back(phase_shape(s, Axis(y, s.stride_h, s.pad_h, s.height, s.out_height),
                                     Axis(x, s.stride_w, s.pad_w, s.width, s.out_width)));
  return shapes;
}

// Of Winograd's tiles those that cost all phases least. Transforms of the largest take longest beside the products.
TransposedKernel best_winograd(const std::vector<Conv2dShape>& phases) {
  double cost[3] = {};
  for (const Conv2dShape& phase : phases)
    if (phase.kernel_h * phase.kernel_w > 1)
      for (int64_t patch : {4, 5, 6}) cost[patch - 4] += winograd_cost(phase, patch) * (patch == 6 ? 1.2 : 1);
  const TransposedKernel kernels[] = {TransposedKernel::winograd_2x2, TransposedKernel::winograd_3x3,
                                      TransposedKernel::winograd};
  return kernels[std::min_element(cost, cost + 3) - cost];
}

// What conv2d chooses for the phase with the most taps. Winograd's least exact tiles are of conv2d alone.
TransposedKernel kernel_of_phases(const Conv2dShape& s, Precision precision) {
  const std::vector<Conv2dShape> phases = phase_shapes(s);
  const auto largest = std::max_element(phases.begin(), phases.end(), [](const Conv2dShape& a, const Conv2dShape& b) {
    return a.kernel_h * a.kernel_w < b.kernel_h * b.kernel_w;
  });
  if (precision == Precision::fast) precision = Precision::standard;
  const Conv2dKernel* kernel = conv2d_kernel("auto", *largest, precision);
  const TransposedKernel number = number_of(kernel ? kernel->name : "gemm");
  const bool winograd = number == TransposedKernel::winograd || number == TransposedKernel::winograd_2x2 ||
                        number == TransposedKernel::winograd_3x3;
  return winograd && phases.size() > 1 ? best_winograd(phases) : number;
}

}  // namespace

bool set_transposed_output_size(Conv2dShape& s, int64_t output_padding_h, int64_t output_padding_w) {
  if (!is_valid_window(s) || !is_window_number(output_padding_h, 0) || !is_window_number(output_padding_w, 0))
    return false;
  if (s.stride_h * s.stride_w > kMostPhases || s.height < 1 || s.width < 1) return false;
  s.out_height = (s.height - 1) * s.stride_h - 2 * s.pad_h + window_reach(s.kernel_h, s.dilation_h) + output_padding_h;
  s.out_width = (s.width - 1) * s.stride_w - 2 * s.pad_w + window_reach(s.kernel_w, s.dilation_w) + output_padding_w;
  return is_window_number(s.out_height, 1) && is_window_number(s.out_width, 1);
}

TransposedKernel conv_transpose2d_kernel(const std::string& name, const Conv2dShape& s, Precision precision) {
  // Then elements of the kernel are phases.
  const bool one_pixel = s.height == 1 && s.width == 1 &&
                         window_reach(s.kernel_h, s.dilation_h) * window_reach(s.kernel_w, s.dilation_w) <= kMostPhases;
  if (name != "auto") {
    const TransposedKernel kernel = number_of(name);
    const bool pixel = kernel == TransposedKernel::pixel || kernel == TransposedKernel::pixel_gemv;
    const bool serves = pixel                                   ? one_pixel && s.groups == 1
                        : kernel == TransposedKernel::depthwise ? is_depthwise(s)
                                                                : name == kNames[size_t(kernel)];
    return serves ? kernel : TransposedKernel::torch;
  }
  if (is_depthwise(s)) return TransposedKernel::depthwise;
  if (one_pixel && s.groups == 1)
    return s.images <= kFewImages ? TransposedKernel::pixel_gemv : TransposedKernel::pixel;
  if (is_plain(s)) return kernel_of_phases(s, precision);
  if (s.groups > 1 && s.group_outputs() < kLanes) return TransposedKernel::torch;
  if (merged_cost(s) < 0.9 * separate_cost(s)) return TransposedKernel::merged;
  return kernel_of_phases(s, precision);
}

ConvTranspose2dPlan::ConvTranspose2dPlan(const Conv2dShape& shape, TransposedKernel kernel)
    : shape_(shape), kernel_(kernel) {
  Conv2dShape& s = shape_;
  if (kernel == TransposedKernel::pixel)
    s.stride_h = s.dilation_h * (s.kernel_h - 1) + 1, s.stride_w = s.dilation_w * (s.kernel_w - 1) + 1;
  const bool joins = kernel == TransposedKernel::merged || (kernel == TransposedKernel::depthwise && !is_plain(s));
  if (kernel == TransposedKernel::pixel_gemv) {
    Part part{Kind::gemv, {}};
    part.tasks = s.images > 0 ? FASTCV_PICK(conv_transpose2d_gemv_tasks)(s) : 0;
    add(part, 0, FASTCV_PICK(conv_transpose2d_gemv_scratch)(s));
    return;
  }
  for (const PhaseRun& y : phase_runs(s.kernel_h, s.stride_h, s.dilation_h, joins))
    for (const PhaseRun& x : phase_runs(s.kernel_w, s.stride_w, s.dilation_w, joins)) {
      const PhaseRuns runs{y, x};
      const bool bias_only = y.taps == 0 || x.taps == 0;
      if (kernel == TransposedKernel::merged || bias_only) {
        Part part{Kind::merged, runs};
        part.tasks = FASTCV_PICK(conv_transpose2d_merged_tasks)(s, runs);
        add(part, FASTCV_PICK(conv_transpose2d_merged_weights)(s, runs),
            FASTCV_PICK(conv_transpose2d_merged_scratch)(s, runs));
      } else if (joins) {
        Part part{Kind::depthwise, runs};
        part.tasks = FASTCV_PICK(conv_transpose2d_depthwise_tasks)(s, runs);
        add(part, FASTCV_PICK(conv_transpose2d_depthwise_weights)(s, runs),
            FASTCV_PICK(conv_transpose2d_depthwise_scratch)(s, runs));
      } else {
        add_phase(runs, kernel);
      }
    }
}

void ConvTranspose2dPlan::add_phase(const PhaseRuns& runs, TransposedKernel kernel) {
  const Conv2dShape& s = shape_;
  const Axis y(runs.y, s.stride_h, s.pad_h, s.height, s.out_height),
      x(runs.x, s.stride_w, s.pad_w, s.width, s.out_width);
  Part part{Kind::phase, runs};
  part.shape = phase_shape(s, y, x);
  part.one_image = kernel == TransposedKernel::pixel && y.out == 1 && x.out == 1 && y.pad == 0 && x.pad == 0;
  if (part.one_image) part.shape.images = 1, part.shape.width = part.shape.out_width = s.images;
  part.kernel = phase_kernel(kernel == TransposedKernel::pixel ? "gemm" : kNames[size_t(kernel)], part.shape);
  part.skip_y = y.skip, part.skip_x = x.skip, part.output_y = y.output, part.output_x = x.output;
  if (s.images > 0 && y.out > 0 && x.out > 0) part.tasks = part.kernel->tasks(part.shape);
  add(part, part.kernel->weights(part.shape), part.tasks > 0 ? part.kernel->scratch(part.shape) : 0);
}

void ConvTranspose2dPlan::add(Part part, int64_t weights, int64_t scratch) {
  part.weight = weights_, part.first = tasks_;
  weights_ += ceil_div(weights, kLanes) * kLanes;
  tasks_ += part.tasks, scratch_ = std::max(scratch_, scratch);
  parts_.push_back(part);
  even_ &= part.tasks == parts_.front().tasks;
}

int64_t ConvTranspose2dPlan::outputs_prepared_together() const {
  int64_t together = std::numeric_limits<int64_t>::max();
  for (const Part& part : parts_)
    together = std::min(together, part.kernel ? fastcv::outputs_prepared_together(*part.kernel, part.shape) : 0);
  return together;
}

int64_t ConvTranspose2dPlan::preparation_tasks(const Part& part) const {
  const int64_t together = part.kernel ? fastcv::outputs_prepared_together(*part.kernel, part.shape) : 0;
  return together ? ceil_div(shape_.out_channels, together) : 1;
}

int64_t ConvTranspose2dPlan::preparation_tasks() const {
  int64_t tasks = 0;
  for (const Part& part : parts_) tasks += preparation_tasks(part);
  return tasks;
}

// [K, C / groups, taps, taps] of a phase, in the order of the input, for its kernel.
void ConvTranspose2dPlan::prepare_phase(const Part& part, const TransposedWeight& w, int64_t task,
                                        float* prepared) const {
  const Conv2dShape& s = shape_;
  const int64_t channels = s.group_channels(), outputs = s.group_outputs(), of_group = w.outputs ? w.outputs : outputs;
  const int64_t each = preparation_tasks(part) > 1 ? fastcv::outputs_prepared_together(*part.kernel, part.shape)
                                                   : s.out_channels;
  const int64_t first = task * each, last = std::min(s.out_channels, first + each);
  const int64_t ty = part.runs.y.taps, tx = part.runs.x.taps, taps = ty * tx, all = s.kernel_h * s.kernel_w;
  std::vector<int64_t> element(static_cast<size_t>(taps));  // of the kernel, of each tap in the order of the input
  for (int64_t i = 0; i < taps; ++i)
    element[size_t(i)] = (part.runs.y.kernel + (ty - 1 - i / tx) * part.runs.y.kernel_step) * s.kernel_w +
                         part.runs.x.kernel + (tx - 1 - i % tx) * part.runs.x.kernel_step;
  std::vector<float> of_phase(size_t((last - first) * channels * taps));
  for (int64_t c0 = 0; c0 < channels; c0 += kLanes)  // some at a time: both sides are read and written by lines
    for (int64_t k = first; k < last; ++k)
      for (int64_t c = c0; c < std::min(channels, c0 + kLanes); ++c) {
        const float* from = w.data + ((k / outputs * channels + c) * of_group + w.first + k % outputs) * all;
        float* to = of_phase.data() + ((k - first) * channels + c) * taps;
        for (int64_t i = 0; i < taps; ++i) to[i] = from[element[size_t(i)]];
      }
  Conv2dShape shape = part.shape;
  shape.out_channels = first;
  prepared += first ? part.kernel->weights(shape) : 0;
  shape.out_channels = last - first;
  part.kernel->prepare(shape, of_phase.data(), w.scale ? w.scale + w.first + first : nullptr, prepared);
}

void ConvTranspose2dPlan::prepare(const TransposedWeight& weight, int64_t task, float* prepared) const {
  size_t p = 0;
  for (; task >= preparation_tasks(parts_[p]); ++p) task -= preparation_tasks(parts_[p]);
  const Part& part = parts_[p];
  float* const to = prepared + part.weight;
  switch (part.kind) {
    case Kind::phase: return prepare_phase(part, weight, task, to);
    case Kind::merged:
      return FASTCV_PICK(conv_transpose2d_merged_prepare)(shape_, part.runs, weight.data, weight.scale, to);
    case Kind::depthwise:
      return FASTCV_PICK(conv_transpose2d_depthwise_prepare)(shape_, part.runs, weight.data, weight.scale, to);
    case Kind::gemv: return;
  }
}

void ConvTranspose2dPlan::prepare(const TransposedWeight& weight, float* prepared) const {
  for (int64_t task = 0; task < preparation_tasks(); ++task) prepare(weight, task, prepared);
}

// The phase as the convolution that it is: its outputs lie `stride` pixels apart.
Conv2d ConvTranspose2dPlan::phase_of(const Conv2d& conv, const Part& part) const {
  Conv2d phase = conv;
  phase.shape = part.shape;
  phase.weight = conv.weight + part.weight;
  phase.input.data += part.skip_y * conv.input.stride_y + part.skip_x * conv.input.stride_x;
  if (part.one_image) phase.input.stride_x = conv.input.stride_n;
  const auto every = [&](auto& map) {
    if (map.data) map.data += part.output_y * map.stride_y + part.output_x * map.stride_x;
    map.stride_y *= shape_.stride_h, map.stride_x *= shape_.stride_w;
    if (part.one_image) map.stride_x = map.stride_n;
  };
  every(phase.output), every(phase.residual);
  return phase;
}

// Tasks of phases take turns, so that threads write to the same lines and pages at about the same time.
void ConvTranspose2dPlan::run(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) const {
  const int64_t parts = int64_t(parts_.size());
  for (int64_t i = begin; i < end; ++i) {
    const Part* part;
    int64_t task;
    if (even_) {
      part = &parts_[size_t(i % parts)], task = i / parts;
    } else {
      part = &*std::prev(
          std::upper_bound(parts_.begin(), parts_.end(), i, [](int64_t n, const Part& p) { return n < p.first; }));
      task = i - part->first;
    }
    if (part->kind == Kind::phase) {
      part->kernel->run(phase_of(conv, *part), task, task + 1, scratch);
      continue;
    }
    if (part->kind == Kind::gemv) {
      FASTCV_PICK(conv_transpose2d_gemv)(conv, task, task + 1, scratch);
      continue;
    }
    Conv2d whole = conv;
    whole.shape = shape_, whole.weight = conv.weight + part->weight;
    const auto run =
        part->kind == Kind::merged ? FASTCV_PICK(conv_transpose2d_merged) : FASTCV_PICK(conv_transpose2d_depthwise);
    run(whole, part->runs, task, task + 1, scratch);
  }
}

}  // namespace fastcv
