// Tensor shell of programs: from lists of numbers and tensors to a program, kept under a handle; plans for each shape.
#include <deque>
#include <unordered_map>

#include "../common/stable.h"
#include "../common/window_size.h"
#include "arenas.h"
#include "run.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastcv {
namespace {

using namespace program;

constexpr size_t kPlansKept = 16;  // of a program, the latest used

struct KeptPlan {
  std::vector<Extent> inputs;
  int64_t threads;
  std::shared_ptr<const Plan> plan;
};

struct Loaded {
  Program program;
  std::vector<Tensor> kept;            // the tensors whose memory weights are
  std::vector<int64_t> input_ranks, output_ranks;
  std::mutex mutex;
  std::deque<KeptPlan> plans;  // the latest used first
  std::unique_ptr<Run> run;  // one that is not at work, for its memory
  bool profile = false;
  std::vector<int64_t> nanoseconds;  // of the last run's steps
  std::shared_ptr<const Plan> profiled;

  std::shared_ptr<const Plan> plan(const std::vector<Extent>& inputs) {
    const int64_t threads = torch::stable::get_num_threads();
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < plans.size(); ++i)
      if (plans[i].inputs == inputs && plans[i].threads == threads) {
        std::rotate(plans.begin(), plans.begin() + ptrdiff_t(i), plans.begin() + ptrdiff_t(i) + 1);
        return plans.front().plan;
      }
    std::shared_ptr<const Plan> made;
    try {
      made = std::make_shared<const Plan>(make_plan(program, inputs, threads));
    } catch (const std::invalid_argument& error) {
      STD_TORCH_CHECK(false, "fastcv program: ", error.what());
    }
    plans.push_front({inputs, threads, made});
    if (plans.size() > kPlansKept) plans.pop_back();
    return made;
  }
};

class Registry {
 public:
  static Registry& instance() {
    static Registry* const registry = new Registry;  // never destroyed: Python may free programs late
    return *registry;
  }
  int64_t add(std::shared_ptr<Loaded> loaded) {
    const std::lock_guard lock(mutex_);
    programs_[++last_] = std::move(loaded);
    return last_;
  }
  std::shared_ptr<Loaded> get(int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = programs_.find(handle);
    STD_TORCH_CHECK(found != programs_.end(), "handle: ", handle, " is not a program");
    return found->second;
  }
  void remove(int64_t handle) {
    std::shared_ptr<Loaded> last;  // destroyed without the lock
    const std::lock_guard lock(mutex_);
    const auto found = programs_.find(handle);
    if (found == programs_.end()) return;
    last = std::move(found->second);
    programs_.erase(found);
    if (programs_.empty()) Arenas::instance().clear();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Loaded>> programs_;
  int64_t last_ = 0;
};

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& code) : code_(code) {}
  int64_t number() {
    STD_TORCH_CHECK(at_ < code_.size(), "code: ends early");
    return code_[at_++];
  }
  int64_t below(int64_t limit, const char* what) {
    const int64_t value = number();
    STD_TORCH_CHECK(value >= 0 && value < limit, "code: ", what, " ", value, " of ", limit);
    return value;
  }
  std::vector<int64_t> list() {
    std::vector<int64_t> values(size_t(below(int64_t(code_.size()) + 1, "length")));
    for (int64_t& value : values) value = number();
    return values;
  }
  bool ended() const { return at_ == code_.size(); }

 private:
  const std::vector<int64_t>& code_;
  size_t at_ = 0;
};

// How many inputs, params and weights a step of each kind has, at least and at most.
struct Arity {
  size_t inputs, most_inputs, params, weights;
};
const Arity kArity[] = {{1, 2, 9, 5}, {1, 1, 10, 0}, {1, 1, 10, 0},      {1, 1, 2, 0},  {2, 2, 2, 0}, {2, 2, 2, 0},
                        {1, 1, 2, 0}, {1, 1, 2, 2},  {1, 1 << 20, 0, 0}, {2, 2, 0, 0},  {1, 1, 2, 0}, {1, 1, 0, 0},
                        {1, 2, 7, 0}, {1, 1, 1, 2},  {1, 1, 0, 1},       {1, 2, 11, 3}, {3, 4, 4, 0},
                        {2, 2, 2, 0}};

// Of windows side by side, whose pixels a byte can count.
bool has_byte_indices(const Step& step) {
  const auto& p = step.params;
  return p[0] == p[2] && p[1] == p[3] && p[4] == 0 && p[5] == 0 && p[6] == 1 && p[7] == 1 && p[0] < 256 && p[1] < 256 &&
         p[0] * p[1] <= 256;
}

// Of the first params, each at least as large as given, and not so large that products of two would overflow.
bool are_window_numbers(const Step& step, const std::vector<int64_t>& least) {
  for (size_t i = 0; i < least.size(); ++i)
    if (!is_window_number(step.params[i], least[i])) return false;
  return true;
}

void check_step(const Program& program, const Step& step) {
  const Arity& a = kArity[size_t(step.op)];
  STD_TORCH_CHECK(step.inputs.size() >= a.inputs && step.inputs.size() <= a.most_inputs &&
                      step.params.size() == a.params && step.weights.size() == a.weights,
                  "code: a step of kind ", int64_t(step.op), " with other inputs, params or weights than it has");
  for (int64_t weight : step.weights)
    STD_TORCH_CHECK(weight >= -1 && weight < int64_t(program.weights.size()), "code: weight ", weight);
  const auto of = [&](size_t i) -> const Weight* {
    return step.weights[i] < 0 ? nullptr : &program.weights[size_t(step.weights[i])];
  };
  const auto is_vector = [&](size_t i, int64_t n) {
    const Weight* w = of(i);
    STD_TORCH_CHECK(!w || (w->size.size() == 1 && (n < 0 || w->size[0] == n)), "weights: expected a vector of ", n);
  };
  if (step.op == Op::conv) {
    const Weight* w = of(0);
    STD_TORCH_CHECK(w && (w->size.size() == 4 || w->size.size() == 2),
                    "weights: expected [K, C / groups, KH, KW] or [K, C]");
    const auto& p = step.params;
    for (int64_t n : w->size) STD_TORCH_CHECK(n > 0, "weights: expected no empty size");
    STD_TORCH_CHECK(are_window_numbers(step, {1, 1, 0, 0, 1, 1, 1}) && w->size[0] % p[6] == 0,
                    "code: stride, padding, dilation or groups of a convolution");
    is_vector(1, w->size[0]), is_vector(2, w->size[0]), is_vector(3, w->size[1] * p[6]),
        is_vector(4, w->size[1] * p[6]);
    STD_TORCH_CHECK((step.weights[3] < 0) == (step.weights[4] < 0), "code: scale and shift of inputs go together");
  } else if (step.op == Op::conv_transpose) {
    const Weight* w = of(0);
    STD_TORCH_CHECK(w && w->size.size() == 4, "weights: expected [C, K / groups, KH, KW]");
    for (int64_t n : w->size) STD_TORCH_CHECK(n > 0, "weights: expected no empty size");
    const auto& p = step.params;
    STD_TORCH_CHECK(are_window_numbers(step, {1, 1, 0, 0, 0, 0, 1, 1, 1}) && w->size[0] % p[8] == 0,
                    "code: stride, padding, dilation or groups of a transposed convolution");
    is_vector(1, w->size[1] * p[8]), is_vector(2, w->size[1] * p[8]);
  } else if (step.op == Op::prelu) {
    STD_TORCH_CHECK(of(0), "code: prelu needs slopes");
    is_vector(0, -1);
  } else if (step.op == Op::affine || step.op == Op::layer_norm) {
    is_vector(0, -1), is_vector(1, -1);
    STD_TORCH_CHECK(step.op == Op::layer_norm || (of(0) && of(1)), "code: affine needs scale and shift");
  } else if (step.op == Op::max_pool || step.op == Op::avg_pool) {
    STD_TORCH_CHECK(are_window_numbers(step, {1, 1, 1, 1, 0, 0, 1, 1}),
                    "code: kernel, stride, padding or dilation of pooling");
    for (size_t i : {0, 1})
      STD_TORCH_CHECK(2 * step.params[4 + i] <= step.params[i], "code: padding of pooling");
    STD_TORCH_CHECK(step.op == Op::avg_pool || !step.params[8] || has_byte_indices(step), "code: pooling with indices");
  } else if (step.op == Op::max_unpool) {
    STD_TORCH_CHECK(are_window_numbers(step, {1, 1, 0, 0}), "code: kernel or sizes of unpooling");
  }
}

// code: inputs with their ranks; values; outputs and their ranks; steps of kind, output, and lists of inputs, params,
// weights.
int64_t program_load(const std::vector<int64_t>& code, const std::vector<Tensor>& weights, int64_t precision,
                     bool low_memory) {
  auto loaded = std::make_shared<Loaded>();
  Program& p = loaded->program;
  STD_TORCH_CHECK(precision >= 0 && precision <= int64_t(Precision::fast), "precision: ", precision);
  p.precision = Precision(precision), p.low_memory = low_memory;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weights: expected float32");
    loaded->kept.push_back(as_contiguous(weight, ScalarType::Float));
    std::vector<int64_t> size;
    for (int64_t d = 0; d < weight.dim(); ++d) size.push_back(weight.size(d));
    p.weights.push_back({data<float>(loaded->kept.back()), size});
  }
  Reader reader(code);
  loaded->input_ranks = reader.list();
  p.inputs = int64_t(loaded->input_ranks.size());
  p.values = reader.below(int64_t(1) << 30, "values");
  p.outputs = reader.list();
  loaded->output_ranks = reader.list();
  std::vector<bool> known(size_t(p.values), false);
  STD_TORCH_CHECK(p.values >= p.inputs && loaded->output_ranks.size() == p.outputs.size(), "code: values or outputs");
  std::fill(known.begin(), known.begin() + p.inputs, true);
  for (int64_t n = reader.below(int64_t(code.size()), "steps"); n > 0; --n) {
    Step step{};
    step.op = Op(reader.below(int64_t(std::size(kArity)), "kind"));
    step.output = reader.below(p.values, "output");
    step.inputs = reader.list(), step.params = reader.list(), step.weights = reader.list();
    for (int64_t v : step.inputs)
      STD_TORCH_CHECK(v >= 0 && v < p.values && known[size_t(v)], "code: value ", v, " is read before it is computed");
    STD_TORCH_CHECK(!known[size_t(step.output)], "code: value ", step.output, " is computed twice");
    known[size_t(step.output)] = true;
    check_step(p, step);
    p.steps.push_back(std::move(step));
  }
  for (int64_t v : p.outputs) STD_TORCH_CHECK(v >= 0 && v < p.values && known[size_t(v)], "code: output ", v);
  STD_TORCH_CHECK(reader.ended(), "code: numbers after the end");
#if defined(__GLIBC__)
  malloc_trim(0);  // the original has run once before, and what it freed would stay beside the weights to be prepared
#endif
  return Registry::instance().add(std::move(loaded));
}

// Ranks: 4 is [N, C, H, W], 2 is [N, C], -4 is [N, H, W, C].
Extent extent_of(const Tensor& t, int64_t rank) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == (rank == 2 ? 2 : 4),
                  "inputs: expected float32 of ", rank == 2 ? 2 : 4, " dimensions");
  if (rank == 2) return {t.size(0), t.size(1), 1, 1};
  if (rank == 4) return {t.size(0), t.size(1), t.size(2), t.size(3)};
  return {t.size(0), t.size(3), t.size(1), t.size(2)};
}

PixelMap<const float> input_map(Tensor& t, int64_t rank) {
  const int channel = rank == 2 || rank == 4 ? 1 : 3;
  const int row = rank == 4 ? 2 : 1, column = rank == 4 ? 3 : 2;
  const bool fits = t.size(channel) <= 1 || t.stride(channel) == 1;
  if (rank == 2) {
    if (!fits) t = torch::stable::contiguous(t);
    return {data<float>(t), t.stride(0), t.stride(0), t.stride(0)};
  }
  if (!fits || t.stride(column) < t.size(channel))
    t = torch::stable::contiguous(t, rank == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  return {data<float>(t), t.stride(0), t.stride(row), t.stride(column)};
}

Tensor make_output(const Extent& e, int64_t rank) {
  if (rank == 2) return empty_cpu({e.n, e.c}, ScalarType::Float);
  if (rank == 4) return empty_cpu({e.n, e.c, e.h, e.w}, ScalarType::Float, MemoryFormat::ChannelsLast);
  return empty_cpu({e.n, e.h, e.w, e.c}, ScalarType::Float);
}

std::vector<Tensor> program_run(int64_t handle, std::vector<Tensor> inputs) {
  const std::shared_ptr<Loaded> loaded = Registry::instance().get(handle);
  const Program& p = loaded->program;
  STD_TORCH_CHECK(inputs.size() == loaded->input_ranks.size(), "inputs: expected ", loaded->input_ranks.size(),
                  ", got ", inputs.size());
  std::vector<Extent> extents;
  Pointers pointers;
  for (size_t i = 0; i < inputs.size(); ++i) {
    extents.push_back(extent_of(inputs[i], loaded->input_ranks[i]));
    pointers.inputs.push_back(input_map(inputs[i], loaded->input_ranks[i]));
  }
  const std::shared_ptr<const Plan> plan = loaded->plan(extents);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < p.outputs.size(); ++i) {
    outputs.push_back(make_output(plan->extents[size_t(p.outputs[i])], loaded->output_ranks[i]));
    pointers.outputs.push_back(mutable_data<float>(outputs.back()));
  }
  std::unique_ptr<Run> run;
  bool profile;
  {
    const std::lock_guard lock(loaded->mutex);
    run = std::move(loaded->run);
    profile = loaded->profile;
  }
  if (!run) run = std::make_unique<Run>();
  const size_t arena_bytes = size_t(plan->arena) * sizeof(float);
  const auto give_back = [](LargeBlocks::Block* block) { Arenas::instance().give_back(*block); };
  LargeBlocks::Block block = Arenas::instance().take(arena_bytes);
  const std::unique_ptr<LargeBlocks::Block, decltype(give_back)> arena(&block, give_back);
  STD_TORCH_CHECK(block.memory || arena_bytes == 0, "fastcv: cannot allocate ", arena_bytes, " bytes for a program");
  pointers.arena = static_cast<float*>(block.memory);
  run->nanoseconds.assign(profile ? plan->steps.size() : 0, 0);
  const int64_t threads = torch::stable::get_num_threads();
  run->start(p, *plan, pointers, threads);
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    const Scratch<float> scratch = allocate_scratch<float>(size_t(plan->scratch));
    run->work(scratch.get());
  });
  const std::lock_guard lock(loaded->mutex);
  if (profile) loaded->nanoseconds = run->nanoseconds, loaded->profiled = plan;
  loaded->run = std::move(run);
  return outputs;
}

// One of several steps that a step of the program was cut into.
bool is_piece(const PlannedStep& planned) { return planned.band.images || planned.transient.floats; }

void program_free(int64_t handle) { Registry::instance().remove(handle); }

// Steps of the last run as rows of numbers: kind (-1: copy), kernel (-1 where there is no choice), nanoseconds,
// multiply-adds, bytes that are read and written once, the sizes of input and output, kernel, stride, padding, dilation
// and groups of a convolution, whether it norms its input, and in how many pieces it was run. Turns measuring on.
Tensor program_profile(int64_t handle) {
  const std::shared_ptr<Loaded> loaded = Registry::instance().get(handle);
  const std::lock_guard lock(loaded->mutex);
  loaded->profile = true;
  const Plan* plan = loaded->profiled.get();
  const size_t steps = plan ? plan->steps.size() : 0;
  std::vector<size_t> first(steps);  // of the pieces of a step
  std::map<size_t, size_t> first_of;
  for (size_t i = 0; i < steps; ++i)
    first[i] = is_piece(plan->steps[i]) ? first_of.try_emplace(plan->steps[i].step, i).first->second : i;
  int64_t rows = 0;
  constexpr int64_t columns = 23, kTime = 2, kWork = 3, kPieces = 22;
  std::vector<int64_t> row_of(steps);
  for (size_t i = 0; i < steps; ++i) row_of[i] = first[i] == i ? rows++ : row_of[first[i]];
  Tensor table = empty_cpu({rows, columns}, ScalarType::Long);
  int64_t* const begin = mutable_data<int64_t>(table);
  for (size_t i = 0; i < steps; ++i) {
    const PlannedStep& s = plan->steps[i];
    int64_t* const out = begin + row_of[i] * columns;
    const bool copy = s.copy_from >= 0;
    const Step* step = copy ? nullptr : &loaded->program.steps[s.step];
    const Extent& in = plan->extents[size_t(copy ? s.copy_from : step->inputs[0])];
    const Extent& to = copy ? in : plan->extents[size_t(step->output)];
    const Conv2dShape& c = s.shape;
    const bool conv = s.conv || s.transposed;
    const int64_t of_output = conv ? c.group_channels() * c.kernel_h * c.kernel_w : 0;
    const int64_t pixels = s.transposed ? c.height * c.width : c.out_height * c.out_width;
    const int64_t work = conv && !s.transient.makes ? c.images * pixels * c.out_channels * of_output : 0;
    const int64_t kernel = s.conv ? s.conv->number : s.transposed ? int64_t(s.transposed->kernel()) : -1;
    const auto elements = [&](int64_t value) {
      const Extent& e = plan->extents[size_t(value)];
      return e.n * e.h * e.w * pixel_elements(*plan, value);
    };
    int64_t read = copy ? elements(s.copy_from) : 0;
    for (size_t k = 0; step && k < step->inputs.size(); ++k) read += step->reads(k) ? elements(step->inputs[k]) : 0;
    const int64_t written = elements(copy ? s.copy_from : step->output);
    const int64_t bytes = 4 * (read + written + to.c * of_output);
    const int64_t row[] = {copy ? -1 : int64_t(step->op),
                           kernel,
                           loaded->nanoseconds[i],
                           work,
                           bytes,
                           in.n,
                           in.c,
                           in.h,
                           in.w,
                           to.c,
                           to.h,
                           to.w,
                           c.kernel_h,
                           c.kernel_w,
                           c.stride_h,
                           c.stride_w,
                           c.pad_h,
                           c.pad_w,
                           c.dilation_h,
                           c.dilation_w,
                           c.groups,
                           s.shape.input_norm,
                           1};
    if (first[i] == i)
      std::copy(std::begin(row), std::end(row), out);
    else
      out[kTime] += row[kTime], out[kWork] += row[kWork], ++out[kPieces];
  }
  return table;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CompositeExplicitAutograd, m) {
  m.impl("program_load", TORCH_BOX(&fastcv::program_load));
  m.impl("program_run", TORCH_BOX(&fastcv::program_run));
  m.impl("program_free", TORCH_BOX(&fastcv::program_free));
  m.impl("program_profile", TORCH_BOX(&fastcv::program_profile));
}
