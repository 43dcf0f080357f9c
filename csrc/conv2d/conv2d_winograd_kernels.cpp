// Convolution with stride 1 and kernels of up to 3 elements along each axis by Winograd's minimal filtering (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", CVPR 2016).
//
// With R elements along an axis, a tile of M output pixels depends on P = M + R - 1 input pixels d. With the matrices B, G
// and A of the paper,
//     output = A^T [ (G g G^T) * (B^T d B) ] A,
// where * multiplies element by element: P^2 products for each pair of channels. B depends on P alone, so that tiles of P x P
// input pixels serve kernels of 2 and 3 elements, 3x2 as well; along an axis of 1 element tiles are 1 pixel high and nothing is
// transformed:
//     P = 6    F(4x4, 3x3): 36 products instead of 144    F(5x5, 2x2): 36 instead of 100    F(4, 3): 6 instead of 12
//     P = 5    F(3x3, 3x3): 25 instead of 81              F(4x4, 2x2): 25 instead of 64     F(4, 2): 5 instead of 8
//     P = 4    F(2x2, 3x3): 16 instead of 36              F(3x3, 2x2): 16 instead of 36     F(3, 2): 4 instead of 6
// Summed over input channels they are matrix products, one for each element e of a tile:
// M_e[tile][k] = sum_c V_e[tile][c] U_e[c][k]. U = G g G^T is prepared once. The points are 0, 1, -1, (2, (-2)) and
// infinity; the error for P = 6 is about three times that of the direct sum.
//
// A task is a block of T tiles times some panels of output channels. It transforms the input of its tiles into V (for P = 6
// 144 T C bytes), then for each panel multiplies and transforms back from M (144 T panel bytes). U of a layer (144 C K
// bytes: 9 MB for 256 x 256) is read once for each block of tiles, from the last-level cache where it fits: T grows with U,
// so that this stays cheap, and shrinks with it, so that V and M stay in the second-level cache and threads share the work
// evenly. Where a layer has few tiles (14x14 pixels: 16) tasks share them and divide the panels.
//
// Dilated convolutions are taken apart into phases without dilation, which pixel strides express.
//
// Arithmetic bounds it where there are tiles enough: the products are a quarter of the direct sum's, and the transforms add
// 2 operations per element and pixel for large C. Where there are few, reading U does: 512 x 512 channels at 7x7 pixels
// have 38 MB for P = 6 (1.05 ms at 37 GB/s, for 0.34 ms of arithmetic) and 17 MB for P = 4 (0.65 ms in all). The last
// tiles of a product prefetch the next one's U.
#include "conv2d_epilogue.h"
#include "conv2d_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;

FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCV_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTCV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a kernel with R elements along an axis: input and output pixels of a tile.
template <int P, int R>
constexpr int kPatch = R == 1 ? 1 : P;
template <int P, int R>
constexpr int kTile = kPatch<P, R> + 1 - R;

FASTCV_INLINE int64_t patch(int64_t p, int64_t kernel) { return kernel == 1 ? 1 : p; }

struct Plan {
  int64_t tile_h, tile_w, elements;                    // output pixels of a tile, products
  int64_t tiles_y, tiles_x, phase_tiles, image_tiles;  // of the largest phase of an image (without dilation there is one)
  int64_t tiles, block, blocks;                        // of all images; of a task
  int64_t panels, panel_groups, group_panels;
  int64_t row;  // floats from one element of V to the next: channels, and what keeps cache sets apart
};

// Cycles, about: transforming the input, then for each panel reading U from the last-level cache at 32 bytes a cycle, the
// products, and transforming back.
double task_cost(const Conv2dShape& s, const Plan& p, int64_t block, int64_t panels) {
  const double elements = double(p.elements), channels = double(s.channels), tiles = double(block);
  const double u = channels * kPanel * 4 * elements / 32, product = channels * kPanelVectors * elements;
  return tiles * channels / L * 7 * elements + double(panels) * (u + tiles * (product + 28 * elements));
}

template <int P>
Plan make_plan(const Conv2dShape& s) {
  Plan p{};
  const int64_t patch_h = patch(P, s.kernel_h), patch_w = patch(P, s.kernel_w);
  p.elements = patch_h * patch_w, p.tile_h = patch_h + 1 - s.kernel_h, p.tile_w = patch_w + 1 - s.kernel_w;
  p.tiles_y = ceil_div(ceil_div(s.out_height, s.dilation_h), p.tile_h);
  p.tiles_x = ceil_div(ceil_div(s.out_width, s.dilation_w), p.tile_w);
  p.phase_tiles = p.tiles_y * p.tiles_x;
  p.image_tiles = s.dilation_h * s.dilation_w * p.phase_tiles;
  p.tiles = s.images * p.image_tiles;
  p.row = ceil_div(s.channels, L) * L + L;
  p.panels = ceil_div(s.out_channels, kPanel);
  const int64_t weights = s.channels * p.panels * kPanel;  // of each element
  const int64_t squares = weights <= 64 * 64 ? 12 : weights <= 256 * 256 ? 24 : 48;
  const int64_t most = p.elements == P ? squares * P : squares, least = ceil_div(p.tiles, most);
  double best = 0;
  for (int64_t blocks = least; blocks <= min_of(p.tiles, least + 2 * s.threads); ++blocks)
    for (int64_t groups = 1; groups <= p.panels; ++groups) {
      const int64_t block = ceil_div(p.tiles, blocks), group_panels = ceil_div(p.panels, groups);
      const int64_t tasks = ceil_div(p.tiles, block) * ceil_div(p.panels, group_panels);
      const double cost = double(ceil_div(tasks, s.threads)) * task_cost(s, p, block, group_panels);
      if (best == 0 || cost < 0.99 * best)
        best = cost, p.block = block, p.group_panels = group_panels;
      if (tasks > 64 * s.threads) break;  // even enough
    }
  p.blocks = ceil_div(p.tiles, p.block);
  p.panel_groups = ceil_div(p.panels, p.group_panels);
  return p;
}

// ---- transforms ------------------------------------------------------------------------------------------------------

// B^T d for one line of a patch.
FASTCV_INLINE void transform_input(const Vec<float> (&d)[6], Vec<float>* out, int64_t step) {
  const Vec<float> a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[step] = a + b;
  out[2 * step] = a - b;
  out[3 * step] = c + e;
  out[4 * step] = c - e;
  out[5 * step] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}
FASTCV_INLINE void transform_input(const Vec<float> (&d)[5], Vec<float>* out, int64_t step) {
  const Vec<float> a = d[3] - d[1];
  out[0] = 2.0f * (d[0] - d[2]) + a;
  out[step] = d[3] - d[2] - 2.0f * d[1];
  out[2 * step] = d[3] - 3.0f * d[2] + 2.0f * d[1];
  out[3 * step] = a;
  out[4 * step] = d[4] - d[2] - 2.0f * a;
}
FASTCV_INLINE void transform_input(const Vec<float> (&d)[4], Vec<float>* out, int64_t step) {
  out[0] = d[0] - d[2];
  out[step] = d[1] + d[2];
  out[2 * step] = d[2] - d[1];
  out[3 * step] = d[1] - d[3];
}
FASTCV_INLINE void transform_input(const Vec<float> (&d)[1], Vec<float>* out, int64_t) { out[0] = d[0]; }

// A^T m for one line: M outputs.
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[6], Vec<float>* out, int64_t step) {
  const Vec<float> a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[step] = b + 2.0f * d;
  out[2 * step] = a + 4.0f * c;
  out[3 * step] = M == 4 ? b + 8.0f * d + m[5] : b + 8.0f * d;
  if constexpr (M == 5) out[4 * step] = a + 16.0f * c + m[5];
}
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[5], Vec<float>* out, int64_t step) {
  const Vec<float> a = m[1] + m[2], b = m[1] - m[2];
  out[0] = m[0] + a + m[3];
  out[step] = b + 2.0f * m[3];
  out[2 * step] = M == 3 ? a + 4.0f * m[3] + m[4] : a + 4.0f * m[3];
  if constexpr (M == 4) out[3 * step] = b + 8.0f * m[3] + m[4];
}
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[4], Vec<float>* out, int64_t step) {
  out[0] = m[0] + m[1] + m[2];
  out[step] = M == 2 ? m[1] - m[2] - m[3] : m[1] - m[2];
  if constexpr (M == 3) out[2 * step] = m[1] + m[2] - m[3];
}
template <int M>
FASTCV_INLINE void transform_output(const Vec<float> (&m)[1], Vec<float>* out, int64_t) {
  out[0] = m[0];
}

// V of one tile: [element][row].
template <int PY, int PX>
void transform_patch(const Conv2d& conv, const Plan& p, int64_t image, int64_t tile, float* v) {
  const Conv2dShape& s = conv.shape;
  const int64_t y0 = tile / p.tiles_x * p.tile_h - s.pad_h, x0 = tile % p.tiles_x * p.tile_w - s.pad_w;
  const float* origin = conv.input.data + image * conv.input.stride_n;
  const float* at[PY * PX];  // null outside the map
  for (int64_t i = 0; i < PY; ++i)
    for (int64_t j = 0; j < PX; ++j) {
      const int64_t y = y0 + i, x = x0 + j;
      const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      at[i * PX + j] = inside ? origin + y * conv.input.stride_y + x * conv.input.stride_x : nullptr;
    }
  for (int64_t c = 0; c < s.channels; c += L) {
    const int n = int(min_of(L, s.channels - c));
    Vec<float> half[PY * PX];  // B^T d
    for (int64_t j = 0; j < PX; ++j) {
      Vec<float> d[PY];
      for (int64_t i = 0; i < PY; ++i) {
        const float* pixel = at[i * PX + j];
        d[i] = !pixel ? Vec<float>{} : n == L ? load(pixel + c) : load_first(pixel + c, n);
      }
      transform_input(d, half + j, PX);
    }
    for (int64_t i = 0; i < PY; ++i) {
      Vec<float> d[PX], out[PX];
      for (int64_t j = 0; j < PX; ++j) d[j] = half[i * PX + j];
      transform_input(d, out, 1);
      for (int64_t j = 0; j < PX; ++j) store(v + (i * PX + j) * p.row + c, out[j]);
    }
  }
}

// The pixels of one tile from its products m, [element][vectors * L], for the channels of one panel.
template <int P, int RY, int RX>
void transform_back(const Conv2d& conv, const Plan& p, int64_t image, int64_t tile, int64_t channel, int vectors,
                    const float* m) {
  constexpr int PY = kPatch<P, RY>, PX = kPatch<P, RX>, MY = kTile<P, RY>, MX = kTile<P, RX>;
  const Conv2dShape& s = conv.shape;
  const Bounds bounds(conv.activation);
  const Vec<float> low = broadcast(bounds.low), high = broadcast(bounds.high);
  const int64_t y0 = tile / p.tiles_x * MY, x0 = tile % p.tiles_x * MX;
  const int64_t rows = min_of(MY, s.out_height - y0), columns = min_of(MX, s.out_width - x0);
  for (int64_t c = channel; vectors--; c += L, m += L) {
    const int n = int(min_of(L, s.out_channels - c));
    Vec<float> half[MY * PX];  // A^T m
    for (int64_t j = 0; j < PX; ++j) {
      Vec<float> line[PY];
      for (int64_t i = 0; i < PY; ++i) line[i] = load(m + (i * PX + j) * kPanel);
      transform_output<MY>(line, half + j, PX);
    }
    const Vec<float> bias = !conv.bias ? Vec<float>{} : n == L ? load(conv.bias + c) : load_first(conv.bias + c, n);
    for (int64_t i = 0; i < rows; ++i) {
      Vec<float> line[PX], out[MX];
      for (int64_t j = 0; j < PX; ++j) line[j] = half[i * PX + j];
      transform_output<MX>(line, out, 1);
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
void multiply(const float* v, int64_t v_step, int64_t channels, const float* u, float* m, int64_t m_step, bool last) {
  Vec<float> sum[R][NV] = {};
  if (last)
    accumulate<true>(sum, v, v_step, channels, u, channels);
  else
    accumulate<false>(sum, v, v_step, channels, u);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(m + r * m_step + i * L, sum[r][i]);
}

template <int R, int NV>
void multiply_rows(int64_t rows, const float* v, int64_t v_step, int64_t channels, const float* u, float* m, int64_t m_step,
                   bool last) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1, NV>(rows, v, v_step, channels, u, m, m_step, last);
  multiply<R, NV>(v, v_step, channels, u, m, m_step, last);
}

template <int NV>
void multiply_block(int64_t tiles, const float* v, int64_t v_step, int64_t channels, const float* u, float* m,
                    int64_t m_step) {
  constexpr int most = tile_rows(NV);
  const int64_t calls = ceil_div(tiles, most);
  for (int64_t i = 0, t = 0; i < calls; ++i) {
    const int64_t rows = (tiles - t) / (calls - i);
    multiply_rows<most, NV>(rows, v + t * v_step, v_step, channels, u, m + t * m_step, m_step, i + 1 == calls);
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

// A convolution with dilation d and padding d is d x d convolutions without, each of every d-th pixel: phase (i, j) of the
// input gives phase (i, j) of the output. The size of one:
Conv2dShape phase_shape(const Conv2dShape& s, int64_t i, int64_t j) {
  Conv2dShape phase = s;
  phase.height = phase.out_height = ceil_div(s.height - i, s.dilation_h);
  phase.width = phase.out_width = ceil_div(s.width - j, s.dilation_w);
  phase.pad_h = phase.pad_w = phase.dilation_h = phase.dilation_w = 1;
  return phase;
}

template <class T>
PixelMap<T> phase_map(const PixelMap<T>& map, const Conv2dShape& s, int64_t i, int64_t j) {
  if (!map.data) return map;
  return {map.data + i * map.stride_y + j * map.stride_x, map.stride_n, s.dilation_h * map.stride_y,
          s.dilation_w * map.stride_x};
}

// Tile t of all images and phases: the convolution that it belongs to, and which tile it is there. Some lie outside the
// smaller phases; they read zeros and write nothing.
struct PhaseTile {
  Conv2d conv;
  int64_t image, tile;

  PhaseTile(const Conv2d& whole, const Plan& p, int64_t t) : conv(whole), image(t / p.image_tiles), tile(t % p.phase_tiles) {
    if (p.phase_tiles == p.image_tiles) return;
    const Conv2dShape& s = whole.shape;
    const int64_t phase = t % p.image_tiles / p.phase_tiles, y = phase / s.dilation_w, x = phase % s.dilation_w;
    conv.shape = phase_shape(s, y, x);
    conv.input = phase_map(whole.input, s, y, x), conv.output = phase_map(whole.output, s, y, x);
    conv.residual = phase_map(whole.residual, s, y, x);
  }
};

template <int P, int RY, int RX>
void run_task(const Conv2d& conv, const Plan& p, int64_t first, int64_t last, int64_t panel, int64_t end_panel, float* scratch) {
  const Conv2dShape& s = conv.shape;
  const int64_t v_step = p.elements * p.row, m_step = p.elements * kPanel;
  float *const v = scratch, *const m = scratch + p.block * v_step;
  for (int64_t t = first; t < last; ++t) {
    const PhaseTile at(conv, p, t);
    transform_patch<kPatch<P, RY>, kPatch<P, RX>>(at.conv, p, at.image, at.tile, v + (t - first) * v_step);
  }
  for (; panel < end_panel; ++panel) {
    const int64_t channel = panel * kPanel;
    const int vectors = int(ceil_div(min_of(kPanel, s.out_channels - channel), L));
    const float* u = conv.weight + channel * s.channels * p.elements;
    for (int64_t e = 0; e < p.elements; ++e, u += s.channels * vectors * L)
      multiply_vectors(vectors, last - first, v + e * p.row, v_step, s.channels, u, m + e * kPanel, m_step);
    for (int64_t t = first; t < last; ++t) {
      const PhaseTile at(conv, p, t);
      transform_back<P, RY, RX>(at.conv, p, at.image, at.tile, channel, vectors, m + (t - first) * m_step);
    }
  }
}

// Row i of G for a kernel of R elements.
template <int P, int R>
FASTCV_INLINE double weight_of(int i, int j) {
  constexpr double kScale[3][5] = {{1, 1 / 2., 1 / 2.}, {1 / 2., -1 / 2., -1 / 6., 1 / 6.}, {1 / 4., -1 / 6., -1 / 6., 1 / 24., 1 / 24.}};
  constexpr double kPoint[5] = {0, 1, -1, 2, -2};
  if (R == 1) return 1;
  if (i == P - 1) return j == R - 1;  // at infinity
  double power = kScale[P - 4][i];
  for (int n = 0; n < j; ++n) power *= kPoint[i];
  return power;
}

// G g G^T for the filters of L output channels at once, g as [RY * RX][L] and u as [elements][L].
template <int P, int RY, int RX>
void transform_weights(const double (&g)[9][L], double (&u)[P * P][L]) {
  constexpr int PY = kPatch<P, RY>, PX = kPatch<P, RX>;
  double half[PY * RX][L] = {};
  for (int i = 0; i < PY; ++i)
    for (int y = 0; y < RY; ++y)
      for (int x = 0; x < RX; ++x)
        for (int l = 0; l < L; ++l) half[RX * i + x][l] += weight_of<P, RY>(i, y) * g[RX * y + x][l];
  memset(u, 0, sizeof u);
  for (int i = 0; i < PY; ++i)
    for (int j = 0; j < PX; ++j)
      for (int x = 0; x < RX; ++x)
        for (int l = 0; l < L; ++l) u[i * PX + j][l] += half[RX * i + x][l] * weight_of<P, RX>(j, x);
}

template <int P, int RY, int RX>
void prepare_weights(const Conv2dShape& s, const float* weight, float* prepared) {
  constexpr int64_t elements = kPatch<P, RY> * kPatch<P, RX>;
  for (int64_t k0 = 0; k0 < s.out_channels; k0 += kPanel) {
    const int64_t columns = ceil_div(min_of(kPanel, s.out_channels - k0), L) * L;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t k = 0; k < columns; k += L) {
        double g[9][L] = {}, u[P * P][L];
        for (int64_t l = 0; l < min_of(L, s.out_channels - k0 - k); ++l)
          for (int64_t i = 0; i < RY * RX; ++i) g[i][l] = weight[((k0 + k + l) * s.channels + c) * RY * RX + i];
        transform_weights<P, RY, RX>(g, u);
        for (int64_t e = 0; e < elements; ++e)
          for (int64_t l = 0; l < L; ++l) prepared[(e * s.channels + c) * columns + k + l] = float(u[e][l]);
      }
    prepared += elements * s.channels * columns;
  }
}

// What depends on the size of the kernel.
struct Functions {
  void (*prepare)(const Conv2dShape&, const float*, float*);
  void (*run_task)(const Conv2d&, const Plan&, int64_t, int64_t, int64_t, int64_t, float*);
};

template <int P, int RY, int RX>
constexpr Functions kFunctions{&prepare_weights<P, RY, RX>, &run_task<P, RY, RX>};

template <int P>
Functions functions(const Conv2dShape& s) {
  switch (s.kernel_h * 3 + s.kernel_w) {
    case 5: return kFunctions<P, 1, 2>;
    case 6: return kFunctions<P, 1, 3>;
    case 7: return kFunctions<P, 2, 1>;
    case 8: return kFunctions<P, 2, 2>;
    case 9: return kFunctions<P, 2, 3>;
    case 10: return kFunctions<P, 3, 1>;
    case 11: return kFunctions<P, 3, 2>;
    default: return kFunctions<P, 3, 3>;
  }
}

template <int P>
int64_t count_tasks(const Conv2dShape& s) {
  const Plan p = make_plan<P>(s);
  return p.blocks * p.panel_groups;
}

template <int P>
int64_t scratch_size(const Conv2dShape& s) {
  const Plan p = make_plan<P>(s);
  return p.block * p.elements * (p.row + kPanel);
}

template <int P>
int64_t count_weights(const Conv2dShape& s) {
  return patch(P, s.kernel_h) * patch(P, s.kernel_w) * s.channels * ceil_div(s.out_channels, L) * L;
}

template <int P>
void run(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) {
  const Plan p = make_plan<P>(conv.shape);
  const auto task = functions<P>(conv.shape).run_task;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i % p.panel_groups, block = i / p.panel_groups;
    task(conv, p, block * p.block, min_of(p.tiles, (block + 1) * p.block), group * p.group_panels,
         min_of(p.panels, (group + 1) * p.group_panels), scratch);
  }
}

}  // namespace

#define FASTCV_WINOGRAD(name, P)                                                                                          \
  int64_t name##_weights(const Conv2dShape& s) { return count_weights<P>(s); }                                             \
  void name##_prepare(const Conv2dShape& s, const float* weight, float* prepared) { functions<P>(s).prepare(s, weight, prepared); } \
  int64_t name##_tasks(const Conv2dShape& s) { return count_tasks<P>(s); }                                                 \
  int64_t name##_scratch(const Conv2dShape& s) { return scratch_size<P>(s); }                                              \
  void name(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) { run<P>(conv, begin, end, scratch); }

FASTCV_WINOGRAD(conv2d_winograd, 6)
FASTCV_WINOGRAD(conv2d_winograd_3x3, 5)
FASTCV_WINOGRAD(conv2d_winograd_2x2, 4)

}  // namespace fastcv::FASTCV_ISA
