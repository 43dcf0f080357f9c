// Convolution with stride 1 by Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016): of kernels of up to 3 elements along each axis, and of 5x5.
//
// With R elements along an axis, a tile of M output pixels depends on P = M + R - 1 input pixels d. With the matrices
// B, G and A of the paper (conv2d_winograd_transforms.h),
//     output = A^T [ (G g G^T) * (B^T d B) ] A,
// where * multiplies element by element: P^2 products for each pair of channels. B depends on P alone, so that tiles of
// P x P input pixels serve kernels of 2 and 3 elements, 3x2 as well; along an axis of 1 element tiles are 1 pixel high
// and nothing is transformed:
//     P = 4    F(2x2, 3x3): 16 products instead of 36    F(3x3, 2x2): 16 instead of 36     F(3, 2): 4 instead of 6
//     P = 5    F(3x3, 3x3): 25 instead of 81             F(4x4, 2x2): 25 instead of 64     F(4, 2): 5 instead of 8
//     P = 6    F(4x4, 3x3): 36 instead of 144            F(5x5, 2x2): 36 instead of 100    F(4, 3): 6 instead of 12
//              F(2x2, 5x5): 36 instead of 100
//     P = 8    F(6x6, 3x3): 64 instead of 324            F(4x4, 5x5): 64 instead of 400
// Summed over input channels they are matrix products, one for each element e of a tile:
// M_e[tile][k] = sum_c V_e[tile][c] U_e[c][k]. U = G g G^T is prepared once. With patches of 8 x 8 errors are about ten
// times those of the direct sum, with others of its size up to twice that.
//
// A task is a block of T tiles times some panels of output channels. It transforms the input of its tiles into V (for P
// = 6 144 T C bytes), then for each panel multiplies and transforms back from M (144 T panel bytes). U of a layer (144
// C K bytes: 9 MB for 256 x 256) is read once for each block of tiles, from the last-level cache where it fits: T grows
// with U, so that this stays cheap, and shrinks with it, so that V and M stay in the second-level cache and threads
// share the work evenly. Where a layer has few tiles (14x14 pixels: 16) tasks share them and divide the panels.
//
// On one core of Zen 4 (110 GFLOP/s), in GFLOP/s of the direct sum by processor time, two runs on a busy machine (the
// first before channels were summed in chunks):
//     F(4x4, 3x3), F(6x6, 3x3)    56x56                112x112              224x224 or 200x272
//     64 -> 64                270-332, 258-359     263-281, 285-289     275-287, 296-309
//     128 -> 128              310-331, 338-352     313-320, 347-368
//     256 -> 256              357-358, 335-351     371-372, 428-441     370-373, 412-438
//     512 -> 512              361-380, 371-392     (28x28: 316-346, 330-339; 14x14: 237, 157)
// so tiles of 6x6 gain 2 to 19 percent on maps of 112 pixels and more, nothing reliable at 56, and lose on small ones.
// Blocks of 6 to 36 tiles instead of those below change that by a few percent up to 256 channels; with 512 small
// blocks, which read U more often, lose up to a third. 5x5, as many times as fast as the matrix product (one run):
//     F(2x2, 5x5), F(4x4, 5x5)    64 -> 192 27x27: 2.0, 3.9    48 -> 64 35x35: 2.1, 3.9    128 -> 128 28x28: 2.1, 3.9
//                                 48 -> 128 7x7: 1.6, 2.7      16 -> 32 28x28: 1.5, 2.6    3 -> 32 64x64: 0.6, 1.3
//
// Dilated convolutions are taken apart into phases without dilation, which pixel strides express.
//
// Arithmetic bounds it where there are tiles enough: the products are a quarter of the direct sum's, and the transforms
// add 2 operations per element and pixel for large C. Where there are few, reading U does: 512 x 512 channels at 7x7
// pixels have 38 MB for P = 6 (1.05 ms at 37 GB/s, for 0.34 ms of arithmetic) and 17 MB for P = 4 (0.65 ms in all). So
// a product prefetches the next one's U, a part during each of its tiles: 512 x 512 channels at 14x14 take 1.67 ms, and
// 1.86 where the last tile fetches all of it.
#include "../common/channel_block.h"
#include "conv2d_epilogue.h"
#include "conv2d_tile.h"
#include "conv2d_winograd_transforms.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;

// Of a kernel with R elements along an axis: input and output pixels of a tile.
template <int P, int R>
constexpr int kPatch = R == 1 ? 1 : P;
template <int P, int R>
constexpr int kTile = kPatch<P, R> + 1 - R;

FASTCV_INLINE int64_t patch(int64_t p, int64_t kernel) { return kernel == 1 ? 1 : p; }

struct Plan {
  int64_t tile_h, tile_w, elements;                    // output pixels of a tile, products
  // Of the largest phase of an image (without dilation there is one).
  int64_t tiles_y, tiles_x, phase_tiles, image_tiles;
  int64_t tiles, block, blocks;                        // of all images; of a task
  int64_t panels, panel_groups, group_panels;
  int64_t row;             // floats from one element of V to the next: channels, and what keeps cache sets apart
  int64_t v_step, m_step;  // floats from one tile's V and M to the next's
};

// Cycles, about: transforming the input, then for each panel reading U from the last-level cache at 32 bytes a cycle,
// the products, and transforming back.
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
  p.tiles = max_of(s.images, 1) * p.image_tiles;
  p.row = ceil_div(s.channels, L) * L + L;
  p.v_step = p.elements * p.row + L, p.m_step = p.elements * kPanel + L;
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

// ---- transforms -----------------------------------------------------------------------------------------------------

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

// ---- products -------------------------------------------------------------------------------------------------------

// Channels are summed in chunks and chunks then, so that rounding errors do not grow with the square root of their
// number.
constexpr int64_t kChunk = 128;

// The next element's U, fetched while this one's is multiplied. Evenly: what memory has no time for is waited for. And
// without divisions, which a product of few channels would feel.
class Fetch {
 public:
  Fetch(const float* next, float lines_a_step) : next_(next), rate_(lines_a_step) {}

  // Where to go on, and how many lines to fetch in each of the next `depth` steps.
  const float* next(int64_t depth, int* lines) {
    const float* const from = next_ + 16 * fetched_;
    done_ += depth;
    for (*lines = 0; fetched_ < int64_t(rate_ * float(done_)); ++*lines) fetched_ += depth;
    return from;
  }

 private:
  const float* next_;
  float rate_;
  int64_t done_ = 0, fetched_ = 0;
};

// M of R tiles for one element and panel.
template <int R, int NV>
void multiply(const float* v, int64_t v_step, int64_t channels, const float* u, float* m, int64_t m_step,
              Fetch& fetch) {
  for (int64_t c = 0; c < channels; c += kChunk) {
    Vec<float> sum[R][NV] = {};
    const int64_t depth = min_of(kChunk, channels - c);
    int lines;
    const float* const next = fetch.next(depth, &lines);
    u = lines ? accumulate<true>(sum, v + c, v_step, depth, u, next, lines)
              : accumulate<false>(sum, v + c, v_step, depth, u);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) {
        float* at = m + r * m_step + i * L;
        store(at, c ? load(at) + sum[r][i] : sum[r][i]);
      }
  }
}

template <int R, int NV>
void multiply_rows(int64_t rows, const float* v, int64_t v_step, int64_t channels, const float* u, float* m,
                   int64_t m_step, Fetch& fetch) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1, NV>(rows, v, v_step, channels, u, m, m_step, fetch);
  multiply<R, NV>(v, v_step, channels, u, m, m_step, fetch);
}

template <int NV>
void multiply_block(int64_t tiles, const float* v, int64_t v_step, int64_t channels, const float* u, float* m,
                    int64_t m_step) {
  constexpr int most = tile_rows(NV);
  const int64_t calls = ceil_div(tiles, most);
  Fetch fetch(u + channels * NV * L, float(NV * L) / float(16 * calls));
  for (int64_t i = 0, t = 0; i < calls; ++i) {
    const int64_t rows = (tiles - t) / (calls - i);
    multiply_rows<most, NV>(rows, v + t * v_step, v_step, channels, u, m + t * m_step, m_step, fetch);
    t += rows;
  }
}

void multiply_vectors(int vectors, int64_t tiles, const float* v, int64_t v_step, int64_t channels, const float* u,
                      float* m, int64_t m_step) {
  switch (vectors) {
    case 1: return multiply_block<1>(tiles, v, v_step, channels, u, m, m_step);
    case 2: return multiply_block<2>(tiles, v, v_step, channels, u, m, m_step);
    case 3: return multiply_block<kPanelVectors == 4 ? 3 : 1>(tiles, v, v_step, channels, u, m, m_step);
    default: return multiply_block<kPanelVectors>(tiles, v, v_step, channels, u, m, m_step);
  }
}

// A convolution with dilation d that keeps the size is d x d convolutions without, each of every d-th pixel: phase (i,
// j) of the input gives phase (i, j) of the output. The size of one:
Conv2dShape phase_shape(const Conv2dShape& s, int64_t i, int64_t j) {
  Conv2dShape phase = s;
  phase.height = phase.out_height = ceil_div(s.height - i, s.dilation_h);
  phase.width = phase.out_width = ceil_div(s.width - j, s.dilation_w);
  phase.pad_h = phase.pad_w = s.kernel_h / 2, phase.dilation_h = phase.dilation_w = 1;
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

  PhaseTile(const Conv2d& whole, const Plan& p, int64_t t)
      : conv(whole), image(t / p.image_tiles), tile(t % p.phase_tiles) {
    if (p.phase_tiles == p.image_tiles) return;
    const Conv2dShape& s = whole.shape;
    const int64_t phase = t % p.image_tiles / p.phase_tiles, y = phase / s.dilation_w, x = phase % s.dilation_w;
    conv.shape = phase_shape(s, y, x);
    conv.input = phase_map(whole.input, s, y, x), conv.output = phase_map(whole.output, s, y, x);
    conv.residual = phase_map(whole.residual, s, y, x);
  }
};

template <int P, int RY, int RX>
void run_task(const Conv2d& conv, const Plan& p, int64_t first, int64_t last, int64_t panel, int64_t end_panel,
              float* scratch) {
  const Conv2dShape& s = conv.shape;
  float *const v = scratch, *const m = scratch + p.block * p.v_step;
  for (int64_t t = first; t < last; ++t) {
    const PhaseTile at(conv, p, t);
    transform_patch<kPatch<P, RY>, kPatch<P, RX>>(at.conv, p, at.image, at.tile, v + (t - first) * p.v_step);
  }
  for (; panel < end_panel; ++panel) {
    const int64_t channel = panel * kPanel;
    const int vectors = int(ceil_div(min_of(kPanel, s.out_channels - channel), L));
    const float* u = conv.weight + channel * s.channels * p.elements;
    for (int64_t e = 0; e < p.elements; ++e, u += s.channels * vectors * L)
      multiply_vectors(vectors, last - first, v + e * p.row, p.v_step, s.channels, u, m + e * kPanel, p.m_step);
    for (int64_t t = first; t < last; ++t) {
      const PhaseTile at(conv, p, t);
      transform_back<P, RY, RX>(at.conv, p, at.image, at.tile, channel, vectors, m + (t - first) * p.m_step);
    }
  }
}

// U of one channel for L filters, which lie at g as [RY * RX][L]; its elements `step` floats apart.
template <int P, int RY, int RX>
FASTCV_INLINE void transform_filters(const float* g, Vec<float> scale, float* u, int64_t step) {
  constexpr int PY = kPatch<P, RY>, PX = kPatch<P, RX>;
  Vec<float> half[RX][PY];  // G g, by columns
  for (int x = 0; x < RX; ++x) {
    Vec<float> column[RY];
    for (int y = 0; y < RY; ++y) column[y] = scale * load(g + (y * RX + x) * L);
    transform_weights(column, half[x]);
  }
  for (int y = 0; y < PY; ++y) {
    Vec<float> row[RX], out[PX];
    for (int x = 0; x < RX; ++x) row[x] = half[x][y];
    transform_weights(row, out);
    for (int x = 0; x < PX; ++x) store(u + (y * PX + x) * step, out[x]);
  }
}

// U = G g G^T of filters [K][C][RY][RX], panel by panel: [element][C][columns]. Some channels' filters are transposed
// into a block, so that a vector has one element of L of them, and U of a few channels is gathered in the caches before
// it goes where it belongs: its elements lie a power of two apart there, and would share sets of the caches.
template <int P, int RY, int RX>
void prepare_weights(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) {
  constexpr int elements = kPatch<P, RY> * kPatch<P, RX>, area = RY * RX;
  constexpr int64_t kChannels = 16, kGathered = 4;
  alignas(64) float filters[kChannels * area * kPanel], gathered[elements * kGathered * kPanel];
  for (int64_t k0 = 0; k0 < s.out_channels; k0 += kPanel) {
    const int64_t columns = ceil_div(min_of(kPanel, s.out_channels - k0), L) * L;
    for (int64_t c0 = 0; c0 < s.channels; c0 += kChannels) {
      const int64_t channels = min_of(kChannels, s.channels - c0);
      for (int64_t k = 0; k < columns; k += L)
        pack(weight + ((k0 + k) * s.channels + c0) * area, s.channels * area, 1, channels * area,
             int(min_of(L, s.out_channels - k0 - k)), filters + k * kChannels * area);
      for (int64_t first = 0; first < channels; first += kGathered) {
        const int64_t depth = min_of(kGathered, channels - first);
        for (int64_t c = 0; c < depth; ++c)
          for (int64_t k = 0; k < columns; k += L) {
            const int n = int(min_of(L, s.out_channels - k0 - k));
            transform_filters<P, RY, RX>(filters + (k * kChannels + (first + c) * L) * area,
                                         scale ? load_some(scale + k0 + k, n) : broadcast(1.0f),
                                         gathered + c * columns + k, kGathered * columns);
          }
        for (int64_t e = 0; e < elements; ++e)
          memcpy(prepared + (e * s.channels + c0 + first) * columns, gathered + e * kGathered * columns,
                 size_t(depth * columns) * sizeof(float));
      }
    }
    prepared += elements * s.channels * columns;
  }
}

// What depends on the size of the kernel.
struct Functions {
  void (*prepare)(const Conv2dShape&, const float*, const float*, float*);
  void (*run_task)(const Conv2d&, const Plan&, int64_t, int64_t, int64_t, int64_t, float*);
};

template <int P, int RY, int RX>
constexpr Functions kFunctions{&prepare_weights<P, RY, RX>, &run_task<P, RY, RX>};

// Of the kernels that is_winograd and is_winograd_to_3 let through: 5x5, and of up to 3 elements, where P = 8 3x3
// alone.
template <int P>
Functions functions(const Conv2dShape& s) {
  if (s.kernel_h == 5) {
    if constexpr (P == 6 || P == 8) return kFunctions<P, 5, 5>;
  }
  if constexpr (P < 8) {
    switch (s.kernel_h * 3 + s.kernel_w) {
      case 5: return kFunctions<P, 1, 2>;
      case 6: return kFunctions<P, 1, 3>;
      case 7: return kFunctions<P, 2, 1>;
      case 8: return kFunctions<P, 2, 2>;
      case 9: return kFunctions<P, 2, 3>;
      case 10: return kFunctions<P, 3, 1>;
      case 11: return kFunctions<P, 3, 2>;
    }
  }
  return kFunctions<P, 3, 3>;
}

template <int P>
int64_t count_tasks(const Conv2dShape& s) {
  const Plan p = make_plan<P>(s);
  return s.images > 0 ? p.blocks * p.panel_groups : 0;
}

template <int P>
int64_t scratch_size(const Conv2dShape& s) {
  const Plan p = make_plan<P>(s);
  return p.block * (p.v_step + p.m_step);
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

#define FASTCV_WINOGRAD(name, P)                                                                        \
  int64_t name##_weights(const Conv2dShape& s) { return count_weights<P>(s); }                          \
  void name##_prepare(const Conv2dShape& s, const float* weight, const float* scale, float* prepared) { \
    functions<P>(s).prepare(s, weight, scale, prepared);                                                \
  }                                                                                                     \
  int64_t name##_tasks(const Conv2dShape& s) { return count_tasks<P>(s); }                              \
  int64_t name##_scratch(const Conv2dShape& s) { return scratch_size<P>(s); }                           \
  void name(const Conv2d& conv, int64_t begin, int64_t end, float* scratch) { run<P>(conv, begin, end, scratch); }

FASTCV_WINOGRAD(conv2d_winograd, 6)
FASTCV_WINOGRAD(conv2d_winograd_2x2, 4)
FASTCV_WINOGRAD(conv2d_winograd_6x6, 8)
FASTCV_WINOGRAD(conv2d_winograd_5x5, 6)
FASTCV_WINOGRAD(conv2d_winograd_5x5_4x4, 8)
FASTCV_WINOGRAD(conv2d_winograd_3x3, 5)

}  // namespace fastcv::FASTCV_ISA
