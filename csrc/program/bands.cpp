// Chains of steps that are worked through in bands of rows, while what one gives the next is in cache.
//
// MobileNet's first block widens 16 to 96 channels at 400 x 544 (84 MB) and takes every second pixel of that. Written
// whole, such a map has left the caches before the next step reads it. So where a step reads only some rows of its
// input for a row of output, both are cut: rows of the first as far as the second needs them, then these rows of the
// second, and so on through the chain. Every row is computed once, by the same kernel, which sees a shorter map whose
// first rows are padding or not, and all threads work at one band of one step; so results are the same to the bit, and
// the price is a meeting of threads for each band.
//
// Cut are products, depthwise and grouped convolutions, and pooling. Winograd's weights are too large to be read for
// every band, and its arithmetic hides memory.
//
// Measured (2 cores of Zen 4, 1 MB of second-level cache each), times with bands over times without: MobileNetV2 at 800
// x 1088 0.89, of 16 images 0.87, of one image at 224 pixels 1.0 (its maps stay in the last-level cache: hence
// kLinkBytes); EfficientNet-B0 of 8 images 0.97; ResNet-50 at 800 x 1088 0.99. Bands of 128 KB a thread gain half.
#include <algorithm>
#include <optional>

#include "program.h"

namespace fastcv::program {
namespace {

constexpr int64_t kLinkBytes = 2048 * 1024;   // of a map, for each thread: less stays in a cache anyway
constexpr int64_t kBandBytes = 768 * 1024;    // of the maps between steps of a chain, for each thread
constexpr int64_t kBandPixels = 96;           // of the last step, for each thread: less is not worth a meeting
constexpr int64_t kMostWeights = 128 * 1024;  // floats of a convolution that may be cut

// Rows of the input that a row of output reads.
struct Window {
  int64_t stride, pad, reach;

  int64_t first(int64_t row) const { return row * stride - pad; }
  int64_t end(int64_t row) const { return first(row) + reach; }  // after the last
};

// Products, depthwise and grouped convolutions.
bool may_be_cut(const Conv2dKernel& kernel) {
  for (int64_t number : {0, 2, 3, 7})
    if (kernel.number == number) return true;
  return false;
}

std::optional<Window> row_window(const Program& program, const Plan& plan, const PlannedStep& planned) {
  const Step& step = program.steps[planned.step];
  const Extent& in = plan.extents[size_t(step.inputs[0])];
  if (in.n * in.c * in.h * in.w == 0 || in.h == 1) return {};
  const auto& p = step.params;
  Window window = {};
  if (planned.conv) {
    const Conv2dShape& shape = planned.shape;
    const bool small = shape.out_channels * shape.group_channels() * shape.kernel_h * shape.kernel_w <= kMostWeights;
    if (!small || !may_be_cut(*planned.conv)) return {};
    window = {shape.stride_h, shape.pad_h, shape.dilation_h * (shape.kernel_h - 1) + 1};
  } else if ((step.op == Op::max_pool && !p[8]) || (step.op == Op::avg_pool && p[4] == 0)) {
    window = {p[2], p[4], p[6] * (p[0] - 1) + 1};
  } else {
    return {};
  }
  if (window.pad >= window.reach) return {};  // the last window would begin below the map
  return window;
}

int64_t bytes_of(const Extent& e) { return 4 * e.n * e.c * e.h * e.w; }

}  // namespace

void find_chains(const Program& program, Plan& plan, int64_t threads) {
  plan.spans.clear();
  for (size_t i = 0; i < program.steps.size(); ++i) plan.spans.push_back({i, i});
  bool before = false;  // whether the step before may be cut
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    const bool may = row_window(program, plan, plan.steps[i]).has_value();
    if (may && before) {
      const int64_t value = program.steps[i - 1].output;
      const bool once = std::count(step.inputs.begin(), step.inputs.end(), value) == 1;
      if (once && step.inputs[0] == value && bytes_of(plan.extents[size_t(value)]) >= kLinkBytes * threads)
        plan.spans[i].first = plan.spans[i - 1].first;
    }
    before = may;
  }
  for (size_t i = program.steps.size(); i-- > 1;)
    if (plan.spans[i].first < i) plan.spans[i - 1].last = plan.spans[i].last;
}

namespace {

class Cutter {
 public:
  Cutter(const Program& program, const Plan& plan, const PlannedStep* first, const PlannedStep* last, int64_t threads)
      : program_(program), plan_(plan), steps_(first, last) {
    for (const PlannedStep& s : steps_) {
      windows_.push_back(row_window(program, plan, s).value());
      heights_.push_back(plan.extents[size_t(program.steps[s.step].output)].h);
    }
    set_band(threads);
  }

  void cut(std::vector<PlannedStep>& to) const {
    const int64_t images = output(0).n, height = heights_.back();
    for (int64_t image = 0; image < images; image += images_) {
      std::vector<int64_t> done(steps_.size());
      for (int64_t row = 0; row < height; row += rows_)
        cut_band(image, std::min(images_, images - image), std::min(height, row + rows_), done, to);
    }
  }

 private:
  const Extent& output(size_t k) const { return plan_.extents[size_t(program_.steps[steps_[k].step].output)]; }

  void set_band(int64_t threads) {
    const Extent& last = output(steps_.size() - 1);
    int64_t image_bytes = 0, row_bytes = 0, rows = 1;  // rows: of a step for each of the last
    for (size_t k = steps_.size() - 1; k-- > 0;) {
      rows *= windows_[k + 1].stride;
      image_bytes += bytes_of(output(k)) / output(k).n;
      row_bytes += rows * 4 * output(k).w * output(k).c;
    }
    const int64_t budget = kBandBytes * threads;
    images_ = std::max<int64_t>(1, budget / image_bytes), rows_ = last.h;
    if (image_bytes <= budget) return;
    rows_ = std::max(budget / row_bytes, (kBandPixels * threads + last.w - 1) / last.w);
    rows_ = std::clamp<int64_t>(rows_, 1, last.h);
    const int64_t bands = (last.h + rows_ - 1) / rows_;
    rows_ = (last.h + bands - 1) / bands;
  }

  // Rows of every step from `done` on, as far as rows of the last step up to `end` need them.
  void cut_band(int64_t image, int64_t images, int64_t end, std::vector<int64_t>& done,
                std::vector<PlannedStep>& to) const {
    const bool all = end == heights_.back();  // also rows that nobody here reads
    std::vector<int64_t> ends(steps_.size(), end);
    for (size_t k = steps_.size() - 1; k-- > 0;)
      ends[k] = all ? heights_[k] : std::clamp(windows_[k + 1].end(ends[k + 1] - 1), done[k], heights_[k]);
    for (size_t k = 0; k < steps_.size(); ++k) {
      if (ends[k] > done[k]) to.push_back(part(k, image, images, done[k], ends[k]));
      done[k] = ends[k];
    }
  }

  PlannedStep part(size_t k, int64_t image, int64_t images, int64_t row, int64_t end) const {
    PlannedStep s = steps_[k];
    const int64_t first = windows_[k].first(row), in_row = std::max<int64_t>(0, first);
    s.band = {image, images, in_row, row, end - row, in_row - first};
    if (s.conv) {
      s.shape.images = images;
      s.shape.height -= in_row;
      s.shape.out_height = end - row;
      s.shape.pad_h = in_row - first;
    }
    return s;
  }

  const Program& program_;
  const Plan& plan_;
  std::vector<PlannedStep> steps_;
  std::vector<Window> windows_;
  std::vector<int64_t> heights_;
  int64_t images_ = 1, rows_ = 1;  // of a band of the last step
};

}  // namespace

void cut_into_bands(const Program& program, Plan& plan, int64_t threads) {
  std::vector<PlannedStep> cut;
  for (size_t i = 0; i < plan.steps.size();) {
    const size_t step = plan.steps[i].step;
    const bool copy = plan.steps[i].copy_from >= 0;
    const size_t length = copy ? 1 : plan.spans[step].last - plan.spans[step].first + 1;
    if (length == 1)
      cut.push_back(plan.steps[i]);
    else
      Cutter(program, plan, &plan.steps[i], &plan.steps[i] + length, threads).cut(cut);
    i += length;
  }
  plan.steps = std::move(cut);
}

}  // namespace fastcv::program
