// Tensor shells of interpolate and its gradient: the coordinates of both axes, as torch computes them.
#include "interpolate.h"

#include <cmath>
#include <string>

#include "../common/stable.h"

namespace fastcv {
namespace {

constexpr int64_t kTaskElements = 64 * 1024;  // of the larger map
constexpr int64_t kPadding = 16;              // of tables: the most lanes

template <class A>
struct Axis {
  std::vector<int32_t> low;
  std::vector<A> weight;  // empty: one tap
};

struct Mode {
  bool bilinear, nails, align_corners;
};

Mode mode_of(const std::string& name, bool align_corners) {
  STD_TORCH_CHECK(name == "nearest" || name == "bilinear" || name == "bed_of_nails",
                  "mode: expected \"nearest\", \"bilinear\" or \"bed_of_nails\", got \"", name, "\"");
  return {name == "bilinear", name == "bed_of_nails", align_corners};
}

// Inputs for each output, in torch's arithmetic: float for nearest, the type of sums for bilinear.
template <class A>
Axis<A> make_axis(const Mode& mode, int64_t in, int64_t out, double scale) {
  Axis<A> axis;
  axis.low.resize(out + kPadding);
  const bool blends = mode.bilinear && in != out;
  if (blends) axis.weight.resize(out + kPadding);
  if (mode.nails) {
    STD_TORCH_CHECK(out % in == 0, "output_size: expected multiples of the input's size, got ", out, " for ", in);
    for (int64_t o = 0; o < out; ++o) axis.low[o] = o % (out / in) ? -1 : int32_t(o / (out / in));
  } else if (!mode.bilinear) {
    const float step = scale > 0 ? float(1 / scale) : float(in) / float(out);
    for (int64_t o = 0; o < out; ++o)
      axis.low[o] = int32_t(std::min<int64_t>(int64_t(std::floor(float(o) * step)), in - 1));
  } else if (!blends) {
    for (int64_t o = 0; o < out; ++o) axis.low[o] = int32_t(o);
  } else {
    const A step = mode.align_corners ? (out > 1 ? A(in - 1) / A(out - 1) : A(0))
                   : scale > 0        ? A(1 / scale)
                                      : A(in) / A(out);
    for (int64_t o = 0; o < out; ++o) {
      const A at = mode.align_corners ? step * A(o) : std::max(A(0), step * (A(o) + A(0.5)) - A(0.5));
      const int64_t low = std::min<int64_t>(int64_t(at), in - 1);
      axis.low[o] = int32_t(low);
      axis.weight[o] = std::min(std::max(at - A(low), A(0)), A(1));
    }
  }
  std::fill(axis.low.begin() + out, axis.low.end(), axis.low[out - 1]);
  return axis;
}

template <class A>
ResampleAxis<A> view(const Axis<A>& axis) {
  return {axis.low.data(), axis.weight.empty() ? nullptr : axis.weight.data()};
}

// The transpose of an axis, outputs in rising order.
template <class A>
struct Transposed {
  std::vector<int32_t> begin, from;
  std::vector<A> weight;
  GatherAxis<A> view() const { return {begin.data(), from.data(), weight.data()}; }
};

constexpr int64_t kMostTaps = 6;  // of a table

template <class A>
struct Table {
  std::vector<int32_t> from;
  std::vector<A> weight;
  int64_t taps = 0, stride = 0;
  TapTable<A> view() const { return {from.empty() ? nullptr : from.data(), weight.data(), taps, stride}; }
};

template <class A>
Table<A> table_of(const Transposed<A>& t, int64_t in) {
  Table<A> table;
  for (int64_t i = 0; i < in; ++i) table.taps = std::max<int64_t>(table.taps, t.begin[i + 1] - t.begin[i]);
  if (table.taps > kMostTaps || table.taps == 0) return table;
  table.stride = in + kPadding;
  table.from.assign(table.taps * table.stride, 0), table.weight.assign(table.taps * table.stride, A(0));
  for (int64_t k = 0; k < table.taps; ++k) {
    const auto exists = [&](int64_t i) { return i < in && t.begin[i] + k < t.begin[i + 1]; };
    int64_t first = 0;
    while (!exists(first)) ++first;
    int32_t last = t.from[t.begin[first] + k];  // where there is none, its neighbour's: vectors of taps stay together
    for (int64_t i = 0; i < table.stride; ++i) {
      const int64_t at = k * table.stride + i;
      if (exists(i)) last = t.from[t.begin[i] + k], table.weight[at] = t.weight[t.begin[i] + k];
      table.from[at] = last;
    }
  }
  return table;
}

template <class A>
Transposed<A> transpose(const Axis<A>& axis, int64_t in, int64_t out) {
  const auto each = [&](const auto& f) {  // f(output, input, weight)
    for (int64_t o = 0; o < out; ++o) {
      const int32_t low = axis.low[o];
      if (low < 0) continue;
      const A weight = axis.weight.empty() || low + 1 >= in ? A(0) : axis.weight[o];
      if (weight != A(1)) f(o, low, A(1) - weight);
      if (weight != A(0)) f(o, low + 1, weight);
    }
  };
  Transposed<A> t;
  t.begin.assign(in + 1, 0);
  each([&](int64_t, int64_t i, A) { ++t.begin[i + 1]; });
  for (int64_t i = 0; i < in; ++i) t.begin[i + 1] += t.begin[i];
  t.from.resize(t.begin[in]), t.weight.resize(t.begin[in]);
  std::vector<int32_t> next(t.begin.begin(), t.begin.end() - 1);
  each([&](int64_t o, int64_t i, A w) { t.from[next[i]] = int32_t(o), t.weight[next[i]++] = w; });
  return t;
}

void check(const Tensor& t, const char* name, const std::vector<int64_t>& size, const char* size_name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected shape [N, C, H, W]");
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, size_name, ": expected two positive numbers");
  STD_TORCH_CHECK(t.size(2) > 0 && t.size(3) > 0, name, ": expected at least one pixel");
  const int64_t most = std::numeric_limits<int32_t>::max() - 2 * kPadding;
  STD_TORCH_CHECK(std::max({size[0], size[1], t.size(2), t.size(3)}) < most, size_name, ": expected less than 2^31");
}

// The kernel `run` over the tasks of a call, whose larger map gives their size.
template <class Task, class A>
void each_task(Task& task, const Tensor& larger, int64_t rows, int64_t (*scratch_size)(const Task&),
               void (*run)(const Task&, int64_t, int64_t, A*)) {
  const int64_t plane = larger.size(2) * larger.size(3) * (task.channels_last ? larger.size(1) : 1);
  task.parts = std::max<int64_t>(1, std::min(rows, plane / kTaskElements));
  const int64_t tasks = larger.size(0) * (task.channels_last ? 1 : larger.size(1)) * task.parts;
  const int64_t grain = std::max<int64_t>(1, kTaskElements * tasks / larger.numel());
  parallel_dynamic(tasks, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>(scratch_size(task));
    run(task, begin, end, scratch.get());
  });
}

Tensor interpolate_cpu(const Tensor& input_any, const std::vector<int64_t>& output_size, double scale_h, double scale_w,
                       const std::string& mode_name, bool align_corners) {
  check(input_any, "input", output_size, "output_size");
  const Mode mode = mode_of(mode_name, align_corners);
  const MemoryFormat format = memory_format(input_any);
  const Tensor input = torch::stable::contiguous(input_any, format);  // itself, unless it is strided otherwise
  Tensor output =
      empty_cpu({input.size(0), input.size(1), output_size[0], output_size[1]}, input.scalar_type(), format);
  if (output.numel() == 0) return output;
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Axis<A> rows = make_axis<A>(mode, input.size(2), output_size[0], scale_h);
    const Axis<A> columns = make_axis<A>(mode, input.size(3), output_size[1], scale_w);
    Interpolate<T> task{feature_map<const T>(input), feature_map<T>(output), view(rows), view(columns),
                        format == MemoryFormat::ChannelsLast, mode.nails, 1,
                        output.numel() * int64_t(sizeof(T)) >= kInterpolateStreamBytes};
    each_task(task, output, output_size[0], FASTCV_PICK(interpolate_scratch<T>), FASTCV_PICK(interpolate<T>));
  });
  return output;
}

Tensor interpolate_backward_cpu(const Tensor& grad_any, const std::vector<int64_t>& input_size, double scale_h,
                                double scale_w, const std::string& mode_name, bool align_corners) {
  check(grad_any, "grad", input_size, "input_size");
  const Mode mode = mode_of(mode_name, align_corners);
  const MemoryFormat format = memory_format(grad_any);
  const Tensor grad = torch::stable::contiguous(grad_any, format);
  Tensor output = empty_cpu({grad.size(0), grad.size(1), input_size[0], input_size[1]}, grad.scalar_type(), format);
  if (output.numel() == 0) return output;
  dispatch_floating(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const auto rows = transpose(make_axis<A>(mode, input_size[0], grad.size(2), scale_h), input_size[0], grad.size(2));
    const Axis<A> axis = make_axis<A>(mode, input_size[1], grad.size(3), scale_w);
    const Transposed<A> columns = transpose(axis, input_size[1], grad.size(3));
    const Table<A> table = table_of(columns, input_size[1]);
    InterpolateBackward<T> task{feature_map<const T>(grad), feature_map<T>(output), rows.view(), columns.view(),
                                table.view(), format == MemoryFormat::ChannelsLast, 1};
    each_task(task, grad, input_size[0], FASTCV_PICK(interpolate_backward_scratch<T>),
              FASTCV_PICK(interpolate_backward<T>));
  });
  return output;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&fastcv::interpolate_cpu));
  m.impl("interpolate_backward", TORCH_BOX(&fastcv::interpolate_backward_cpu));
}
