// Transposed convolution with few output channels: phases side by side as columns of one matrix product.
//
// The phases of `runs` read the same input, taps_y x taps_x pixels of C / groups channels. So a block of outputs is one
// row of a product with depth taps_y * taps_x * C / groups and phases_y * phases_x * K / groups columns, in this order:
// 64x64 with stride 32 and 21 classes has 21504 columns, 84 deep, and all lanes of its vectors are used, where one
// phase would fill 21 of 32. Arithmetic bounds it. Columns of one row of phases lie side by side in the output too (in
// one group), so that storing a tile is a copy of long runs, cut at the border of the output; it adds about 3
// operations to the depth.
//
// As in conv2d_gemm.h, weights lie in panels of columns, the input of a block is copied with zeros for what is outside
// the map, and a tile of sums stays in registers over the whole depth. A task is a block of an image and group times
// some panels; a panel is used for all its pixels in turn.
//
// Phases without taps have depth 0: bias, residual and activation alone.
#include "../conv2d/conv2d_epilogue.h"
#include "../conv2d/conv2d_tile.h"
#include "conv_transpose2d.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kBlockElements = 48 * 1024, kMostBlocks = 192, kEnoughTasks = 8;

struct Plan {
  BlockRange y, x;
  int64_t columns, depth;
  int64_t height, width, tasks_y, tasks_x;  // blocks of a task
  int64_t panels, panel_groups, group_panels;
  int64_t strip_h, strip_w;  // pixels of the copied input

  Plan(const Conv2dShape& s, const PhaseRuns& runs)
      : y(runs.y.first, runs.y.count, s.stride_h, s.pad_h, s.out_height),
        x(runs.x.first, runs.x.count, s.stride_w, s.pad_w, s.out_width) {
    columns = runs.y.count * runs.x.count * s.group_outputs();
    depth = runs.y.taps * runs.x.taps * s.group_channels();
    const int64_t rows = y.end - y.begin, across = x.end - x.begin;
    const int64_t most = max_of(12, min_of(kMostBlocks, kBlockElements / max_of(1, s.group_channels())));
    tasks_x = ceil_div(across, most), width = ceil_div(across, max_of(1, tasks_x));
    height = max_of(1, min_of(rows, most / max_of(1, width))), tasks_y = ceil_div(rows, height);
    panels = ceil_div(columns, kPanel);
    const int64_t tasks = s.images * s.groups * tasks_y * tasks_x;
    panel_groups = min_of(panels, ceil_div(kEnoughTasks * s.threads, max_of(1, tasks)));
    group_panels = ceil_div(panels, panel_groups), panel_groups = ceil_div(panels, group_panels);
    strip_h = height + max_of(0, runs.y.taps - 1) * runs.y.step,
    strip_w = width + max_of(0, runs.x.taps - 1) * runs.x.step;
  }
};

// Where the blocks of a task begin, in blocks, and whose they are.
struct Task {
  int64_t image, group, y, x, height, width, panel, end_panel;

  Task(const Conv2dShape& s, const Plan& p, int64_t i) {
    panel = i % p.panel_groups * p.group_panels, end_panel = min_of(p.panels, panel + p.group_panels);
    i /= p.panel_groups;
    x = p.x.begin + i % p.tasks_x * p.width, i /= p.tasks_x;
    y = p.y.begin + i % p.tasks_y * p.height, i /= p.tasks_y;
    group = i % s.groups, image = i / s.groups;
    height = min_of(p.height, p.y.end - y), width = min_of(p.width, p.x.end - x);
  }
};

// ---- sums -----------------------------------------------------------------------------------------------------------

struct Tile {
  const float* input;  // of the first block
  int64_t step;        // to the next one's
  int64_t runs_y, runs_x, run_y, run_x, run;  // runs of the depth, from one to the next, and elements of one
  const float *weight, *bias;
  float* sums;  // [block][kPanel]
};

template <int R, int NV>
void run_tile(const Tile& t) {
  Vec<float> sum[R][NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][v] = load(t.bias + v * L);
  const float *weight = t.weight, *row = t.input;
  for (int64_t i = 0; i < t.runs_y; ++i, row += t.run_y) {
    const float* input = row;
    for (int64_t j = 0; j < t.runs_x; ++j, input += t.run_x) weight = accumulate(sum, input, t.step, t.run, weight);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(t.sums + r * kPanel + v * L, sum[r][v]);
}

template <int R, int NV>
void run_rows(int64_t rows, const Tile& t) {
  if constexpr (R > 1)
    if (rows < R) return run_rows<R - 1, NV>(rows, t);
  run_tile<R, NV>(t);
}

void run_vectors(int vectors, int64_t rows, const Tile& t) {
  switch (vectors) {
    case 1: return run_rows<tile_rows(1), 1>(rows, t);
    case 2: return run_rows<tile_rows(2), 2>(rows, t);
    case 3: return run_rows<tile_rows(3), kPanelVectors == 4 ? 3 : 1>(rows, t);
    default: return run_rows<tile_rows(4), kPanelVectors>(rows, t);
  }
}

// ---- storing --------------------------------------------------------------------------------------------------------

// A run of columns that lie side by side in the output: some pixels of a row of phases, or (wide maps, groups) one.
struct Segments {
  int64_t length, in_row;

  Segments(const Conv2d& conv, const PhaseRuns& runs) {
    const Conv2dShape& s = conv.shape;
    const bool dense =
        conv.output.stride_x == s.out_channels && (!conv.residual.data || conv.residual.stride_x == s.out_channels);
    const bool joined = s.groups == 1 && dense;
    in_row = joined ? 1 : runs.x.count, length = joined ? runs.x.count * s.group_outputs() : s.group_outputs();
  }
};

// Sums of columns first to last of the block (y, x) to the output; those outside it are dropped.
FASTCV_INLINE void store_block(const Conv2d& conv, const PhaseRuns& runs, const Segments& segments,
                               const Bounds& bounds, int64_t image, int64_t group, int64_t y, int64_t x, int64_t first,
                               int64_t last, const float* sums) {
  const Conv2dShape& s = conv.shape;
  const int64_t outputs = s.group_outputs();
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  for (int64_t at = first; at < last;) {
    const int64_t segment = at / segments.length, end = min_of(last, (segment + 1) * segments.length);
    const int64_t oy = y * s.stride_h + runs.y.first + segment / segments.in_row - s.pad_h;
    const int64_t ox = x * s.stride_w + runs.x.first + segment % segments.in_row - s.pad_w;
    const int64_t offset = at - segment * segments.length;  // in the segment, whose first pixel is ox
    if (oy >= 0 && oy < s.out_height) {
      const int64_t from = max_of(offset, -ox * outputs);
      const int64_t to = min_of(offset + end - at, (s.out_width - ox) * outputs);
      float* output = pixel(conv.output, image, oy, ox) + group * outputs;
      const float* residual = conv.residual.data ? pixel(conv.residual, image, oy, ox) + group * outputs : nullptr;
      const float* sum = sums + (at - first) - offset;
      int64_t i = from;
      if (bounds.exact && !residual)
        for (; i + L <= to; i += L) store(output + i, min(high, max(low, load(sum + i))));
      for (; i < to; i += L)
        finish(conv, load(sum + i), nullptr, residual ? residual + i : nullptr, output + i, int(min_of(L, to - i)));
    }
    at = end;
  }
}

// ---- a task ---------------------------------------------------------------------------------------------------------

// The input of a task's blocks: [strip_h][strip_w][channels of the group], zero outside the map.
void copy_strip(const Conv2d& conv, const PhaseRuns& runs, const Plan& p, const Task& t, float* strip) {
  const Conv2dShape& s = conv.shape;
  const int64_t channels = s.group_channels();
  const int64_t top = t.y + runs.y.base - (runs.y.taps - 1) * runs.y.step,
                left = t.x + runs.x.base - (runs.x.taps - 1) * runs.x.step;
  const int64_t first = min_of(p.strip_w, max_of(0, -left)), last = max_of(first, min_of(p.strip_w, s.width - left));
  for (int64_t i = 0; i < p.strip_h; ++i, strip += p.strip_w * channels) {
    const int64_t y = top + i;
    if (y < 0 || y >= s.height || first == last) {
      memset(strip, 0, size_t(p.strip_w * channels) * sizeof(float));
      continue;
    }
    memset(strip, 0, size_t(first * channels) * sizeof(float));
    if (s.groups == 1 && conv.input.stride_x == channels) {
      memcpy(strip + first * channels, pixel(conv.input, t.image, y, left + first),
             size_t((last - first) * channels) * sizeof(float));
    } else {
      for (int64_t x = first; x < last; ++x)
        memcpy(strip + x * channels, pixel(conv.input, t.image, y, left + x) + t.group * channels,
               size_t(channels) * sizeof(float));
    }
    memset(strip + last * channels, 0, size_t((p.strip_w - last) * channels) * sizeof(float));
  }
}

void run_panel(const Conv2d& conv, const PhaseRuns& runs, const Plan& p, const Task& task, int64_t panel,
               const Segments& segments, const float* strip, float* sums) {
  const Conv2dShape& s = conv.shape;
  const int64_t channels = s.group_channels(), outputs = s.group_outputs(), first = panel * kPanel;
  const int64_t columns = min_of(kPanel, p.columns - first);
  const int vectors = int(ceil_div(columns, L));
  float bias[kPanel] = {};
  if (conv.bias)
    for (int64_t i = 0, k = first % outputs; i < columns; ++i, k = k + 1 == outputs ? 0 : k + 1)
      bias[i] = conv.bias[task.group * outputs + k];
  Tile t{};
  const bool whole_rows = runs.x.step == 1;
  const Bounds bounds(conv.activation);
  t.step = channels, t.runs_y = p.depth ? runs.y.taps : 0, t.runs_x = whole_rows ? 1 : runs.x.taps;
  t.run_y = runs.y.step * p.strip_w * channels, t.run_x = runs.x.step * channels;
  t.run = whole_rows ? runs.x.taps * channels : channels;
  t.weight = conv.weight + (task.group * ceil_div(p.columns, L) * L + first) * p.depth;
  t.bias = bias, t.sums = sums;
  for (int64_t y = 0; y < task.height; ++y) {
    const int64_t tiles = ceil_div(task.width, tile_rows(vectors));
    for (int64_t i = 0, x = 0; i < tiles; ++i) {
      const int64_t rows = (task.width - x) / (tiles - i);
      t.input = strip + (y * p.strip_w + x) * channels;
      run_vectors(vectors, rows, t);
      for (int64_t r = 0; r < rows; ++r)
        store_block(conv, runs, segments, bounds, task.image, task.group, task.y + y, task.x + x + r, first,
                    first + columns, sums + r * kPanel);
      x += rows;
    }
  }
}

int64_t sums_size() { return tile_rows(1) * kPanel + L; }

}  // namespace

int64_t conv_transpose2d_merged_weights(const Conv2dShape& s, const PhaseRuns& runs) {
  const Plan p(s, runs);
  return s.groups * ceil_div(p.columns, L) * L * p.depth;
}

void conv_transpose2d_merged_prepare(const Conv2dShape& s, const PhaseRuns& runs, const float* weight,
                                     const float* scale, float* prepared) {
  const Plan p(s, runs);
  const int64_t channels = s.group_channels(), outputs = s.group_outputs(), taps = s.kernel_h * s.kernel_w;
  const auto at = [&](int64_t g, int64_t n, int64_t ty, int64_t tx, int64_t c) {
    if (n >= p.columns) return 0.0f;
    const int64_t k = n % outputs, x = n / outputs % runs.x.count, y = n / outputs / runs.x.count;
    const int64_t ky = runs.y.kernel + y + ty * runs.y.kernel_step, kx = runs.x.kernel + x + tx * runs.x.kernel_step;
    const float w = weight[((g * channels + c) * outputs + k) * taps + ky * s.kernel_w + kx];
    return scale ? w * scale[g * outputs + k] : w;
  };
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t n0 = 0; n0 < p.columns; n0 += kPanel) {
      const int64_t columns = ceil_div(min_of(kPanel, p.columns - n0), L) * L;
      for (int64_t ty = runs.y.taps; ty-- > 0;)  // in the order of the input
        for (int64_t tx = runs.x.taps; tx-- > 0;)
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t n = 0; n < columns; ++n) *prepared++ = at(g, n0 + n, ty, tx, c);
    }
}

int64_t conv_transpose2d_merged_tasks(const Conv2dShape& s, const PhaseRuns& runs) {
  const Plan p(s, runs);
  return s.images * s.groups * p.tasks_y * p.tasks_x * p.panel_groups;
}

int64_t conv_transpose2d_merged_scratch(const Conv2dShape& s, const PhaseRuns& runs) {
  const Plan p(s, runs);
  return sums_size() + (p.depth ? p.strip_h * p.strip_w * s.group_channels() : 0);
}

void conv_transpose2d_merged(const Conv2d& conv, const PhaseRuns& runs, int64_t begin, int64_t end, float* scratch) {
  const Plan p(conv.shape, runs);
  const Segments segments(conv, runs);
  float *const sums = scratch, *const strip = scratch + sums_size();
  for (int64_t i = begin; i < end; ++i) {
    const Task task(conv.shape, p, i);
    if (p.depth) copy_strip(conv, runs, p, task, strip);
    for (int64_t panel = task.panel; panel < task.end_panel; ++panel)
      run_panel(conv, runs, p, task, panel, segments, strip, sums);
  }
}

}  // namespace fastcv::FASTCV_ISA
