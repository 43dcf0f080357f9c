// 3x3 convolution with stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016).
//
// A tile of 4x4 output pixels depends on 6x6 input pixels d. With the matrices B, G and A of the paper,
//     output = A^T [ (G g G^T) * (B^T d B) ] A,
// where * multiplies element by element: 36 products for each pair of channels instead of 144. Summed over input channels
// they are 36 matrix products, one for each element e of a tile: M_e[tile][k] = sum_c V_e[tile][c] U_e[c][k]. U = G g G^T
// is prepared once. The points are 0, 1, -1, 2, -2 and infinity; the error is about three times that of the direct sum.
//
// A task is a block of T tiles times some panels of output channels. It transforms the input of its tiles into V (144 T C
// bytes), then for each panel multiplies and transforms back from M (144 T panel bytes). U of a layer (144 C K bytes: 9 MB
// for 256 x 256) is read once for each block of tiles, from the last-level cache where it fits: T grows with U, so that
// this stays cheap, and shrinks with it, so that V and M stay in the second-level cache and threads share the work evenly.
// Where a layer has few tiles (14x14 pixels: 16) tasks share them and divide the panels.
//
// Arithmetic bounds it: the products are a quarter of the direct sum's, and the transforms add 2 operations per element
// and pixel for large C.
#include "conv2d_epilogue.h"
#include "conv2d_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kTile = 4, kPatch = 6, kElements = 36;
constexpr int64_t kEnoughTasks = 12;

FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCV_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTCV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int64_t tiles_y, tiles_x, tiles;  // of an image
  int64_t block, blocks;            // tiles of a task, blocks of an image
  int64_t panels, panel_groups, group_panels;
  int64_t row;                      // floats from one element of V to the next: channels, and what keeps cache sets apart
};

Plan make_plan(const Conv2dShape& s) {
  Plan p{};
  p.tiles_y = ceil_div(s.out_height, kTile), p.tiles_x = ceil_div(s.out_width, kTile);
  p.tiles = p.tiles_y * p.tiles_x;
  p.row = ceil_div(s.channels, L) * L + L;
  p.panels = ceil_div(s.out_channels, kPanel);
  const int64_t weights = s.channels * p.panels * kPanel;  // of each element
  const int64_t most = weights <= 64 * 64 ? 12 : weights <= 256 * 256 ? 24 : 48;
  p.blocks = ceil_div(p.tiles, most);
  p.block = ceil_div(p.tiles, p.blocks);
  p.blocks = ceil_div(p.tiles, p.block);
  p.panel_groups = min_of(p.panels, ceil_div(kEnoughTasks, max_of(1, s.images * p.blocks)));
  p.group_panels = ceil_div(p.panels, p.panel_groups);
  p.panel_groups = ceil_div(p.panels, p.group_panels);
  return p;
}

// ---- transforms ------------------------------------------------------------------------------------------------------

// B^T d for one line of a patch.
FASTCV_INLINE void transform_input(const Vec<float> (&d)[kPatch], Vec<float>* out, int64_t step) {
  const Vec<float> a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[step] = a + b;
  out[2 * step] = a - b;
  out[3 * step] = c + e;
  out[4 * step] = c - e;
  out[5 * step] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// A^T m for one line.
FASTCV_INLINE void transform_output(const Vec<float> (&m)[kPatch], Vec<float>* out, int64_t step) {
  const Vec<float> a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[step] = b + 2.0f * d;
  out[2 * step] = a + 4.0f * c;
  out[3 * step] = b + 8.0f * d + m[5];
}

// V of one tile: [element][row].
void transform_patch(const Conv2d& conv, const Plan& p, int64_t image, int64_t tile, float* v) {
  const Conv2dShape& s = conv.shape;
  const int64_t y0 = tile / p.tiles_x * kTile - s.pad_h, x0 = tile % p.tiles_x * kTile - s.pad_w;
  const float* origin = conv.input.data + image * conv.input.stride_n;
  const float* at[kElements];  // null outside the map
  for (int64_t i = 0; i < kPatch; ++i)
    for (int64_t j = 0; j < kPatch; ++j) {
      const int64_t y = y0 + i, x = x0 + j;
      const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      at[i * kPatch + j] = inside ? origin + y * conv.input.stride_y + x * conv.input.stride_x : nullptr;
    }
  for (int64_t c = 0; c < s.channels; c += L) {
    const int n = int(min_of(L, s.channels - c));
    Vec<float> half[kElements];  // B^T d
    for (int64_t j = 0; j < kPatch; ++j) {
      Vec<float> d[kPatch];
      for (int64_t i = 0; i < kPatch; ++i) {
        const float* pixel = at[i * kPatch + j];
        d[i] = !pixel ? Vec<float>{} : n == L ? load(pixel + c) : load_first(pixel + c, n);
      }
      transform_input(d, half + j, kPatch);
    }
    for (int64_t i = 0; i < kPatch; ++i) {
      Vec<float> d[kPatch], out[kPatch];
      for (int64_t j = 0; j < kPatch; ++j) d[j] = half[i * kPatch + j];
      transform_input(d, out, 1);
      for (int64_t j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * p.row + c, out[j]);
    }
  }
}

// The pixels of one tile from its products m, [element][vectors * L], for the channels of one panel.
void transform_back(const Conv2d& conv, const Plan& p, int64_t image, int64_t tile, int64_t channel, int vectors,
                    const float* m) {
  const Conv2dShape& s = conv.shape;
  const Bounds bounds(conv.activation);
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  const int64_t y0 = tile / p.tiles_x * kTile, x0 = tile % p.tiles_x * kTile;
  const int64_t rows = min_of(kTile, s.out_height - y0), columns = min_of(kTile, s.out_width - x0);
  for (int64_t c = channel; vectors--; c += L, m += L) {
    const int n = int(min_of(L, s.out_channels - c));
    Vec<float> half[kTile * kPatch];  // A^T m
    for (int64_t j = 0; j < kPatch; ++j) {
      Vec<float> line[kPatch];
      for (int64_t i = 0; i < kPatch; ++i) line[i] = load(m + (i * kPatch + j) * kPanel);
      transform_output(line, half + j, kPatch);
    }
    const Vec<float> bias = !conv.bias ? Vec<float>{} : n == L ? load(conv.bias + c) : load_first(conv.bias + c, n);
    for (int64_t i = 0; i < rows; ++i) {
      Vec<float> line[kPatch], out[kTile];
      for (int64_t j = 0; j < kPatch; ++j) line[j] = half[i * kPatch + j];
      transform_output(line, out, 1);
      float* output = pixel(conv.output, image, y0 + i, x0) + c;
      const float* residual = conv.residual.data ? pixel(conv.residual, image, y0 + i, x0) + c : nullptr;
      for (int64_t j = 0; j < columns; ++j) {
        const Vec<float> sum = out[j] + bias;
        if (bounds.exact && n == L)
          store(output, min(high, max(low, residual ? sum + load(residual) : sum)));
        else
          finish(conv, sum, nullptr, residual, output, n);
        output += conv.output.stride_x;
        if (residual) residual += conv.residual.stride_x;
      }
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

// M of R tiles for one element and panel.
template <int R, int NV>
void multiply(const float* v, int64_t v_step, int64_t channels, const float* u, float* m, int64_t m_step) {
  Vec<float> sum[R][NV] = {};
  accumulate(sum, v, v_step, channels, u);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(m + r * m_step + i * L, sum[r][i]);
}

template <int R, int NV>
void multiply_rows(int64_t rows, const float* v, int64_t v_step, int64_t channels, const float* u, float* m, int64_t m_step) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1, NV>(rows, v, v_step, channels, u, m, m_step);
  multiply<R, NV>(v, v_step, channels, u, m, m_step);
}

template <int NV>
void multiply_block(int64_t tiles, const float* v, int64_t v_step, int64_t channels, const float* u, float* m,
                    int64_t m_step) {
  constexpr int most = tile_rows(NV);
  const int64_t calls = ceil_div(tiles, most);
  for (int64_t i = 0, t = 0; i < calls; ++i) {
    const int64_t rows = (tiles - t) / (calls - i);
    multiply_rows<most, NV>(rows, v + t * v_step, v_step, channels, u, m + t * m_step, m_step);
    t += rows;
  }
}

void multiply_vectors(int vectors, int64_t tiles, const float* v, int64_t v_step, int64_t channels, const float* u, float* m,
                      int64_t m_step) {
  switch (vectors) {
    case 1: return multiply_block<1>(tiles, v, v_step, channels, u, m, m_step);
    case 2: return multiply_block<2>(tiles, v, v_step, channels, u, m, m_step);
    case 3: return multiply_block<kPanelVectors == 4 ? 3 : 1>(tiles, v, v_step, channels, u, m, m_step);
    default: return multiply_block<kPanelVectors>(tiles, v, v_step, channels, u, m, m_step);
  }
}

void run_task(const Conv2d& conv, const Plan& p, int64_t image, int64_t first, int64_t last, int64_t panel, int64_t end_panel,
              float* scratch) {
  const Conv2dShape& s = conv.shape;
  const int64_t v_step = kElements * p.row, m_step = kElements * kPanel;
  float *const v = scratch, *const m = scratch + p.block * v_step;
  for (int64_t t = first; t < last; ++t) transform_patch(conv, p, image, t, v + (t - first) * v_step);
  for (; panel < end_panel; ++panel) {
    const int64_t channel = panel * kPanel;
    const int vectors = int(ceil_div(min_of(kPanel, s.out_channels - channel), L));
    const float* u = conv.weight + channel * s.channels * kElements;
    for (int64_t e = 0; e < kElements; ++e, u += s.channels * vectors * L)
      multiply_vectors(vectors, last - first, v + e * p.row, v_step, s.channels, u, m + e * kPanel, m_step);
    for (int64_t t = first; t < last; ++t) transform_back(conv, p, image, t, channel, vectors, m + (t - first) * m_step);
  }
}

// G g G^T.
void transform_weight(const float* g, double (&u)[kElements]) {
  constexpr double G[kPatch][3] = {{1 / 4., 0, 0},           {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
                                   {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
  double half[kPatch][3];
  for (int i = 0; i < kPatch; ++i)
    for (int j = 0; j < 3; ++j) half[i][j] = G[i][0] * g[j] + G[i][1] * g[3 + j] + G[i][2] * g[6 + j];
  for (int i = 0; i < kPatch; ++i)
    for (int j = 0; j < kPatch; ++j)
      u[i * kPatch + j] = half[i][0] * G[j][0] + half[i][1] * G[j][1] + half[i][2] * G[j][2];
}

}  // namespace

int64_t conv2d_winograd_weights(const Conv2dShape& s) { return kElements * s.channels * ceil_div(s.out_channels, L) * L; }

void conv2d_winograd_prepare(const Conv2dShape& s, const float* weight, float* prepared) {
  for (int64_t k0 = 0; k0 < s.out_channels; k0 += kPanel) {
    const int64_t columns = ceil_div(min_of(kPanel, s.out_channels - k0), L) * L;
    for (int64_t k = 0; k < columns; ++k)
      for (int64_t c = 0; c < s.channels; ++c) {
        double u[kElements] = {};
        if (k0 + k < s.out_channels) transform_weight(weight + ((k0 + k) * s.channels + c) * 9, u);
        for (int64_t e = 0; e < kElements; ++e) prepared[(e * s.channels + c) * columns + k] = float(u[e]);
      }
    prepared += kElements * s.channels * columns;
  }
}

int64_t conv2d_winograd_tasks(const Conv2dShape& s) {
  const Plan p = make_plan(s);
  return s.images * p.blocks * p.panel_groups;
}

int64_t conv2d_winograd_scratch(const Conv2dShape& s) {
  const Plan p = make_plan(s);
  return p.block * kElements * (p.row + kPanel);
}

void conv2d_winograd(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) {
  const Plan p = make_plan(conv.shape);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i % p.panel_groups, block = i / p.panel_groups % p.blocks, image = i / p.panel_groups / p.blocks;
    run_task(conv, p, image, block * p.block, min_of(p.tiles, (block + 1) * p.block), group * p.group_panels,
             min_of(p.panels, (group + 1) * p.group_panels), scratch);
  }
}

}  // namespace fastcv::FASTCV_ISA
