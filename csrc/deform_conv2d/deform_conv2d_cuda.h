// What the CUDA kernels of deformable convolution share: points at which it samples, four channels at a time, and
// matrix products by tiles of registers.
#pragma once

#include "../common/cuda_launch.h"
#include "deform_conv2d_position.h"
#include "deform_conv2d_tensors.h"

namespace fastcv::cuda::deform {

constexpr int kThreads = 128;

// Blocks that give an H200's 132 processors work, and bytes that stay in its second-level cache; less in the tests,
// whose tensors are small.
#if defined(FASTCV_CUDA_EMULATED)
constexpr int64_t kEnoughBlocks = 4, kSlabBytes = 64 << 10;
#else
constexpr int64_t kEnoughBlocks = 128, kSlabBytes = 32 << 20;
#endif

template <class A>
constexpr ScalarType kAccumulateType = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// ---- four numbers side by side --------------------------------------------------------------------------------------

template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T x[4];
};

// Channels of pixels, with any strides.
template <class T>
struct Map {
  const T* data;
  int64_t stride[4];
};

// The first n of four channels from `at` on, the others zero. kVector: they lie side by side and aligned, and n is no
// less than four, or no more than zero.
template <bool kVector, class T>
__device__ Four<T> load_four(const T* at, int64_t stride, int n) {
  Four<T> v{};
  if constexpr (kVector) {
    if (n > 0) v = *reinterpret_cast<const Four<T>*>(at);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j, at += stride)
      if (j < n) v.x[j] = *at;
  }
  return v;
}

// Whether kVector holds for a map that is read from multiples of `channels` on, to the next.
template <class T>
bool lies_in_fours(const Map<T>& map, int64_t channels) {
  const bool strides = map.stride[0] % 4 == 0 && map.stride[1] == 1 && map.stride[2] % 4 == 0 && map.stride[3] % 4 == 0;
  return strides && channels % 4 == 0 && reinterpret_cast<uintptr_t>(map.data) % alignof(Four<T>) == 0;
}

template <class T>
Map<T> any_map(const Tensor& tensor) {
  Map<T> map{data<T>(tensor), {}};
  read_strides(tensor, map.stride);
  return map;
}

// Numbers of a shape that kernels divide by and count with.
struct Counts {
  int taps, group_channels, group_outputs, offset_group_channels;

  explicit Counts(const DeformConv2dShape& s)
      : taps(int(s.taps())),
        group_channels(int(s.group_channels())),
        group_outputs(int(s.group_outputs())),
        offset_group_channels(int(s.offset_group_channels())) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;
    STD_TORCH_CHECK(s.channels * s.taps() < limit && s.out_channels < limit, "weight: expected fewer than ", limit,
                    " output channels, and as many elements for one of all groups");
  }
};

// ---- points ---------------------------------------------------------------------------------------------------------

// A pixel of the output.
struct OutputPixel {
  int64_t image;
  int y, x;

  __device__ OutputPixel(const DeformConv2dShape& s, int64_t p) {
    const int64_t row = p / s.out_width;
    image = row / s.out_height, y = int(row % s.out_height), x = int(p % s.out_width);
  }
  __device__ void advance(const DeformConv2dShape& s, int n) {
    for (x += n; x >= int(s.out_width); x -= int(s.out_width))
      if (++y == int(s.out_height)) y = 0, ++image;
  }
  __device__ int64_t in(const int64_t (&stride)[4]) const { return image * stride[0] + y * stride[2] + x * stride[3]; }
};

// Where a kernel element samples: the upper left of four pixels, and how far below and right of it.
template <class A>
struct Point {
  A fy, fx, mask;
  int y, x;
};
constexpr int kNowhere = -4;  // as y: nothing is read

// A NaN makes the sample NaN and is read nowhere.
template <class A>
__device__ Point<A> locate(const DeformConv2dShape& s, int out_y, int out_x, int tap, A offset_y, A offset_x, A mask) {
  const int kernel_w = int(s.kernel_w), tap_y = tap / kernel_w, tap_x = tap % kernel_w;
  const A y = A(out_y * int(s.stride_h) - int(s.pad_h) + tap_y * int(s.dilation_h)) + offset_y;
  const A x = A(out_x * int(s.stride_w) - int(s.pad_w) + tap_x * int(s.dilation_w)) + offset_x;
  Point<A> p;
  int low, high;  // validity follows from the indices
  split(y, int(s.height), &p.y, &p.fy, &low, &high);
  split(x, int(s.width), &p.x, &p.fx, &low, &high);
  p.mask = mask;
  if (y != y || x != x) p.y = kNowhere, p.fy = p.fx = A(NAN);
  return p;
}

// A sample exactly on the line one pixel before the first counts as outside, but for its derivatives.
template <class A>
__device__ bool on_edge(const Point<A>& p) {
  return (p.y == -1 && p.fy == 0) || (p.x == -1 && p.fx == 0);
}

// A point in an image: its upper left pixel, and which of the four pixels are in the image.
template <class T>
struct Site {
  using A = accumulate_t<T>;
  const T* at;
  int valid;
  A fy, fx, mask;
};
enum Corner : int { kUpperLeft = 1, kUpperRight = 2, kLowerLeft = 4, kLowerRight = 8 };

// at: of the image.
template <class T, class A>
__device__ Site<T> site_of(const DeformConv2dShape& s, const Map<T>& map, const T* at, const Point<A>& p) {
  const unsigned height = unsigned(s.height), width = unsigned(s.width);
  const int rows = (unsigned(p.y) < height ? kUpperLeft | kUpperRight : 0) |
                   (unsigned(p.y + 1) < height ? kLowerLeft | kLowerRight : 0);
  const int columns = (unsigned(p.x) < width ? kUpperLeft | kLowerLeft : 0) |
                      (unsigned(p.x + 1) < width ? kUpperRight | kLowerRight : 0);
  return {at + p.y * map.stride[2] + p.x * map.stride[3], rows & columns, p.fy, p.fx, p.mask};
}

// Four channels of the pixels around a point, as they lie in memory.
template <class T>
struct Corners {
  Four<T> upper_left, upper_right, lower_left, lower_right;
};

// Channels from `channel` on, of which there are n. Pixels outside the image are zero.
template <bool kVector, class T>
__device__ Corners<T> load_corners(const Map<T>& map, const Site<T>& site, int64_t channel, int n) {
  const T *upper = site.at + channel * map.stride[1], *lower = upper + map.stride[2];
  return {load_four<kVector>(upper, map.stride[1], site.valid & kUpperLeft ? n : 0),
          load_four<kVector>(upper + map.stride[3], map.stride[1], site.valid & kUpperRight ? n : 0),
          load_four<kVector>(lower, map.stride[1], site.valid & kLowerLeft ? n : 0),
          load_four<kVector>(lower + map.stride[3], map.stride[1], site.valid & kLowerRight ? n : 0)};
}

// The first n of four samples, times the mask; the others are zero.
template <class T, class A = accumulate_t<T>>
__device__ Four<A> interpolate(const Corners<T>& c, const Site<T>& p, int n) {
  const A below = p.fy, above = 1 - below, right = p.fx, left = 1 - right;
  const A weight[4] = {above * left, above * right, below * left, below * right};
  Four<A> value;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    A sum = to_accumulate(c.upper_left.x[j]) * weight[0];
    sum += to_accumulate(c.upper_right.x[j]) * weight[1];
    sum += to_accumulate(c.lower_left.x[j]) * weight[2];
    sum += to_accumulate(c.lower_right.x[j]) * weight[3];
    value.x[j] = j < n ? sum * p.mask : A(0);
  }
  return value;
}

// ---- matrix products ------------------------------------------------------------------------------------------------

// A block of 16 x 8 threads sums a tile of kRows x kColumns, each thread kR x kC of them in registers, from chunks of
// kDepth rows of both factors in shared memory. Of each chunk a thread loads four numbers of the columns' factor and
// kLoads times four of the rows'.
template <class Sum, int kR, int kC>
struct Tile {
  using A = Sum;
  static constexpr int kThreadRows = kR, kThreadColumns = kC;
  static constexpr int kRows = 16 * kR, kColumns = 8 * kC, kDepth = 4 * kThreads / kColumns;
  static constexpr int kQuads = kRows / 4, kLoads = (kDepth * kQuads + kThreads - 1) / kThreads;
  // Blocks on a processor at a time, for which registers are to suffice.
  static constexpr int kBlocks = sizeof(A) == 8 ? 2 : kR * kC > 16 ? 3 : 4;

  // Rows are four longer, so that threads that write below each other meet different banks.
  struct alignas(16) Chunk {
    A rows[kDepth][kRows + 4], columns[kDepth][kColumns + 4];
  };

  // Where in the tile the thread's sum (i, j) lies. A warp covers 4 x 8 threads.
  __device__ static int row(int i) { return element<kR, 16>(threadIdx.x / 8, i); }
  __device__ static int column(int j) { return element<kC, 8>(threadIdx.x % 8, j); }

  // f(i, row, at) for the four numbers of the rows' factor that the thread loads i-th.
  template <class F>
  __device__ static void each_load(const F& f) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = int(threadIdx.x) + i * kThreads;
      if (index < kDepth * kQuads) f(i, index / kQuads, index % kQuads * 4);
    }
  }

  // Of all chunks: fetch() reads the next one to registers, put(chunk) writes it to shared memory, next() is false
  // after the last. While a chunk is multiplied, the next one is on its way.
  template <class Next, class Fetch, class Put>
  __device__ static void sum_chunks(Chunk (&chunks)[2], A (&sum)[kR][kC], const Next& next, const Fetch& fetch,
                                    const Put& put) {
    fetch();
    put(chunks[0]);
    __syncthreads();
    for (int current = 0;; current ^= 1) {
      const bool more = next();
      if (more) fetch();
      multiply(chunks[current], sum);
      if (!more) return;
      put(chunks[current ^ 1]);
      __syncthreads();
    }
  }

 private:
  __device__ static void multiply(const Chunk& chunk, A (&sum)[kR][kC]) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      A a[kR], b[kC];
      read<16>(chunk.rows[k], row(0), a), read<8>(chunk.columns[k], column(0), b);
#pragma unroll
      for (int i = 0; i < kR; ++i)
#pragma unroll
        for (int j = 0; j < kC; ++j) sum[i][j] += a[i] * b[j];
    }
  }
  // A thread's numbers lie in fours; those of all threads follow each other.
  template <int n, int kAcross>
  __device__ static int element(int thread, int i) {
    return n < 4 ? thread * n + i : i / 4 * 4 * kAcross + thread * 4 + i % 4;
  }
  template <int kAcross, int n>
  __device__ static void read(const A* line, int first, A (&x)[n]) {
    if constexpr (n < 4) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = line[first + i];
    } else {
#pragma unroll
      for (int i = 0; i < n; i += 4) {
        const Four<A> four = *reinterpret_cast<const Four<A>*>(line + first + i * kAcross);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i + j] = four.x[j];
      }
    }
  }
};

// f(Tile) with one that suits a product of so many rows and columns, `products` times: the larger one where it gives
// enough blocks. It follows from shapes alone, so sums are the same at every run.
template <class A, class F>
void with_tile(int64_t rows, int64_t columns, int64_t products, const F& f) {
  using Large = Tile<A, 8, 8>;
  if constexpr (sizeof(A) == 4) {
    const int64_t blocks = ceil_div(rows, Large::kRows) * ceil_div(columns, Large::kColumns) * products;
    if (rows > 64 && blocks >= kEnoughBlocks) return f(Large{});
  }
  f(Tile<A, 4, 4>{});
}

}  // namespace fastcv::cuda::deform
