// Where values lie. A value has its own buffer in the arena, or lies in another's:
//     - slices, and vectors made of maps of one pixel, in their input;
//     - what a cat joins, in its output, at its channels. Cats are looked at from the last to the first, and one whose
//       inputs lie side by side already (DenseNet joins ever more of the same values) needs no place of its own;
//     - the result of an elementwise step, or of a convolution with a residual, in an input that nobody reads later.
// The steps of a chain (bands.cpp) run together: what one of them reads or writes lives as long as the chain runs.
// Buffers whose lives do not overlap share memory: the largest first, each at the lowest place that is free.
#include <algorithm>
#include <limits>

#include "program.h"

namespace fastcv::program {
namespace {

constexpr int64_t kAlignment = 16;  // floats

int64_t ceil_to_line(int64_t floats) { return (floats + kAlignment - 1) / kAlignment * kAlignment; }

class Placement {
 public:
  Placement(const Program& program, Plan& plan) : program_(program), plan_(plan), nodes_(plan.extents.size()) {
    find_lives();
    join_views();
    join_cats();
    join_in_place();
    name_roots();
    set_offsets();
    set_places();
  }

 private:
  struct Node {
    int64_t parent = -1, channel = 0;  // where it lies in the parent
    bool has_children = false, is_output = false;
    bool in_place = false;  // all of its parent, which nobody reads once this is written
    int64_t born = -1, last_use = -1;  // steps; -1: before the first
  };
  struct Seat {
    int64_t root, channel;
  };

  bool is_input(int64_t value) const { return value < program_.inputs; }

  Seat seat(int64_t value) const {
    int64_t channel = 0;
    while (nodes_[size_t(value)].parent >= 0) {
      channel += nodes_[size_t(value)].channel;
      value = nodes_[size_t(value)].parent;
    }
    return {value, channel};
  }

  void put(int64_t value, int64_t parent, int64_t channel) {
    nodes_[size_t(value)].parent = parent, nodes_[size_t(value)].channel = channel;
    nodes_[size_t(parent)].has_children = true;
  }

  void find_lives() {
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const Step& step = program_.steps[i];
      nodes_[size_t(step.output)].born = int64_t(plan_.spans[i].first);
      for (size_t k = 0; k < step.inputs.size(); ++k)
        if (step.reads(k)) nodes_[size_t(step.inputs[k])].last_use = int64_t(plan_.spans[i].last);
    }
    for (int64_t value : program_.outputs) {
      nodes_[size_t(value)].is_output = true;
      nodes_[size_t(value)].last_use = int64_t(program_.steps.size());
    }
  }

  bool is_view(const Step& step) const {
    const Extent& in = plan_.extents[size_t(step.inputs[0])];
    return step.op == Op::slice || (step.op == Op::flatten && in.h == 1 && in.w == 1);
  }

  void join_views() {
    for (const Step& step : program_.steps)
      if (is_view(step)) put(step.output, step.inputs[0], step.op == Op::slice ? step.params[0] : 0);
  }

  void join_cats() {
    for (size_t i = program_.steps.size(); i-- > 0;) {
      const Step& step = program_.steps[i];
      if (step.op != Op::cat) continue;
      Node& out = nodes_[size_t(step.output)];
      const Seat first = seat(step.inputs[0]);
      int64_t channel = 0;
      bool side_by_side = out.parent < 0 && !out.is_output && !is_input(first.root);
      for (int64_t value : step.inputs) {
        const Seat s = seat(value);
        side_by_side &= s.root == first.root && s.channel == first.channel + channel;
        channel += plan_.extents[size_t(value)].c;
      }
      if (side_by_side && first.root != step.inputs[0]) {
        put(step.output, first.root, first.channel);
        continue;
      }
      channel = 0;
      for (int64_t value : step.inputs) {
        const Node& node = nodes_[size_t(value)];
        if (node.parent < 0 && !is_input(value) && !node.is_output && value != step.output)
          put(value, step.output, channel);
        channel += plan_.extents[size_t(value)].c;
      }
    }
  }

  // Of a chain no other step may read it: a band of that one may come after what is written here.
  bool may_take(int64_t value, size_t step) const {
    const Node& node = nodes_[size_t(value)];
    const Span span = plan_.spans[step];
    for (size_t i = span.first; i <= span.last; ++i) {
      const auto& inputs = program_.steps[i].inputs;
      if (i != step && std::count(inputs.begin(), inputs.end(), value)) return false;
    }
    return (node.parent < 0 || node.in_place) && !node.has_children && !is_input(value) && !node.is_output &&
           node.last_use == int64_t(span.last);
  }

  void join_in_place() {
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const Step& step = program_.steps[i];
      const Node& out = nodes_[size_t(step.output)];
      if (out.parent >= 0 || out.has_children || out.is_output) continue;
      const bool conv = (step.op == Op::conv || step.op == Op::conv_transpose) && step.inputs.size() == 2 &&
                        step.inputs[0] != step.inputs[1];
      const bool elementwise = step.op == Op::add || step.op == Op::mul || step.op == Op::merge ||
                               step.op == Op::activate || step.op == Op::affine || step.op == Op::layer_norm ||
                               step.op == Op::prelu;
      if (!conv && !elementwise) continue;
      const int64_t value = step.inputs[conv ? 1 : 0];
      if (may_take(value, i) && plan_.extents[size_t(value)] == plan_.extents[size_t(step.output)] &&
          plan_.packed[size_t(value)] == plan_.packed[size_t(step.output)])
        put(step.output, value, 0), nodes_[size_t(step.output)].in_place = true;
    }
  }

  // Outputs that have a buffer of their own are written where they belong; the others are copied at the end.
  void name_roots() {
    plan_.places.assign(nodes_.size(), Place{});
    for (int64_t i = 0; i < program_.inputs; ++i) plan_.places[size_t(i)] = {Place::Kind::input, i, 0, 0, 0};
    std::vector<bool> taken(nodes_.size());
    for (size_t i = 0; i < program_.outputs.size(); ++i) {
      const int64_t value = program_.outputs[i];
      if (nodes_[size_t(value)].parent < 0 && !is_input(value) && !taken[size_t(value)])
        plan_.places[size_t(value)] = {Place::Kind::output, int64_t(i), 0, 0, 0};
      else
        copies_.push_back({value, int64_t(i)});
      taken[size_t(value)] = true;
    }
  }

  struct Buffer {
    int64_t root, from, to, size, offset;  // root: a value, or -1 - the step whose weights it holds
  };

  void set_offsets() {
    std::vector<Buffer> buffers(nodes_.size());
    for (size_t v = 0; v < nodes_.size(); ++v) {
      Buffer& b = buffers[size_t(seat(int64_t(v)).root)];
      const Node& node = nodes_[v];
      b.from = b.size ? std::min(b.from, node.born) : node.born;
      b.to = std::max({b.size ? b.to : node.born, node.born, node.last_use});
      b.size = 1;
    }
    std::vector<Buffer> wanted, done;
    for (size_t v = 0; v < nodes_.size(); ++v) {
      const Extent& e = plan_.extents[v];
      if (nodes_[v].parent >= 0 || plan_.places[v].kind != Place::Kind::arena) continue;
      const int64_t size = ceil_to_line(e.n * pixel_elements(plan_, int64_t(v)) * e.h * e.w) + 64 * kAlignment;
      wanted.push_back({int64_t(v), buffers[v].from, buffers[v].to, size, 0});
    }
    for (int64_t i = 0; i < int64_t(plan_.steps.size()); ++i) {
      const int64_t floats = plan_.steps[size_t(i)].transient.floats;
      if (floats > 0) wanted.push_back({-1 - i, i, i, ceil_to_line(floats), 0});
    }
    std::stable_sort(wanted.begin(), wanted.end(), [](const Buffer& a, const Buffer& b) { return a.size > b.size; });
    for (Buffer& b : wanted) {
      std::vector<std::pair<int64_t, int64_t>> busy;  // while b lives
      for (const Buffer& other : done)
        if (other.from <= b.to && b.from <= other.to) busy.emplace_back(other.offset, other.offset + other.size);
      std::sort(busy.begin(), busy.end());
      for (const auto& [begin, end] : busy) {
        if (begin >= b.offset + b.size) break;
        b.offset = std::max(b.offset, end);
      }
      // Maps often have sizes that are multiples of 4 KB: pixels of two would meet in the same sets of the caches.
      if (b.root >= 0)
        plan_.places[size_t(b.root)].offset = b.offset + int64_t(done.size()) * 13 % 64 * kAlignment;
      else
        plan_.steps[size_t(-1 - b.root)].transient.offset = b.offset;
      plan_.arena = std::max(plan_.arena, b.offset + b.size);
      done.push_back(b);
    }
  }

  void set_places() {
    for (size_t v = 0; v < nodes_.size(); ++v) {
      const Seat s = seat(int64_t(v));
      Place place = plan_.places[size_t(s.root)];
      place.channel = s.channel, place.channels = pixel_elements(plan_, s.root);
      if (nodes_[v].parent >= 0) plan_.places[v] = place;
      else plan_.places[v].channels = place.channels;
    }
    const std::vector<PlannedStep> all = std::move(plan_.steps);
    plan_.steps.clear();
    for (size_t i = 0; i < all.size(); ++i) {
      const Step& step = program_.steps[i];
      if (is_view(step)) continue;
      if (step.op == Op::cat)
        copy_inputs(i);
      else
        plan_.steps.push_back(all[i]);
    }
    for (const auto& [value, output] : copies_) {
      PlannedStep copy{program_.steps.size()};
      copy.copy_from = value, copy.copy_output = output;
      plan_.steps.push_back(copy);
    }
  }

  void copy_inputs(size_t i) {
    const Step& cat = program_.steps[i];
    const Seat out = seat(cat.output);
    int64_t channel = 0;
    for (int64_t value : cat.inputs) {
      const Seat s = seat(value);
      if (s.root != out.root || s.channel != out.channel + channel) {
        PlannedStep copy{i};
        copy.copy_from = value, copy.copy_to = cat.output, copy.copy_channel = channel;
        plan_.steps.push_back(copy);
      }
      channel += plan_.extents[size_t(value)].c;
    }
  }

  const Program& program_;
  Plan& plan_;
  std::vector<Node> nodes_;
  std::vector<std::pair<int64_t, int64_t>> copies_;  // of values to outputs
};

}  // namespace

void place_values(const Program& program, Plan& plan) { Placement(program, plan); }

}  // namespace fastcv::program
