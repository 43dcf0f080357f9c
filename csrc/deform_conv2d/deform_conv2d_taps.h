// Where deformable convolution samples: from offsets to addresses and bilinear weights, once for all channels.
//
// Work goes by panels of kPanel consecutive output pixels (counted through all images). For each panel, offset group
// and kernel element the positions are found in vector form, then turned into what the layout of the input needs:
//   planes         PairTaps: a sample is two pairs of horizontal neighbours, each read by one load;
//   channels-last  CornerTaps: a sample is four pixels, each a vector of channels.
// A corner outside the input contributes nothing, also where the memory at hand holds infinity or NaN; a NaN among
// offset and mask makes the sample NaN.
#pragma once

#include "deform_conv2d.h"
#include "deform_conv2d_position.h"
#include "deform_conv2d_tile.h"

namespace fastcv::FASTCV_ISA {
namespace {

// ---- output pixels --------------------------------------------------------------------------------------------------

template <class A>
struct Pixels {
  int count;  // lanes in use; the others repeat the last one
  int64_t image[kPanel<A>];
  int32_t y[kPanel<A>], x[kPanel<A>];
  int32_t window_y[kPanel<A>], window_x[kPanel<A>];  // upper left corner of the kernel's window in the input
};

template <class A>
void locate_pixels(const DeformConv2dShape& s, int64_t first, int64_t last, Pixels<A>& pixels) {
  pixels.count = int(last - first < kPanel<A> ? last - first : kPanel<A>);
  const int64_t in_image = s.out_height * s.out_width;
  int64_t image = first / in_image, y = first % in_image / s.out_width, x = first % s.out_width;
  for (int i = 0; i < kPanel<A>; ++i) {
    pixels.image[i] = image;
    pixels.y[i] = int32_t(y), pixels.x[i] = int32_t(x);
    pixels.window_y[i] = int32_t(y * s.stride_h - s.pad_h), pixels.window_x[i] = int32_t(x * s.stride_w - s.pad_w);
    if (i + 1 >= pixels.count) continue;
    if (++x == s.out_width) x = 0, ++y;
    if (y == s.out_height) y = 0, ++image;
  }
}

// Where the pixels lie in a tensor of the output's height and width.
template <class A>
struct Addresses {
  int64_t at[kPanel<A>];
  bool run;  // kPanel pixels, one after the other
};

template <class A>
void find_addresses(const Pixels<A>& pixels, const int64_t* stride, Addresses<A>& addresses) {
  addresses.run = pixels.count == kPanel<A>;
  for (int i = 0; i < kPanel<A>; ++i) {
    addresses.at[i] = pixels.image[i] * stride[0] + pixels.y[i] * stride[2] + pixels.x[i] * stride[3];
    addresses.run &= addresses.at[i] == addresses.at[0] + i;
  }
}

template <class S, class A>
FASTCV_INLINE void load_row_of(const S* source, const Addresses<A>& addresses, A* row) {
  if constexpr (sizeof(accumulate_t<S>) == sizeof(A)) {
    if (addresses.run) {
      store(row, load(source + addresses.at[0]));
      store(row + kLanes<A>, load(source + addresses.at[0] + kLanes<A>));
      return;
    }
  }
  for (int i = 0; i < kPanel<A>; ++i) row[i] = A(to_accumulate(source[addresses.at[i]]));
}

// One channel of a tensor at the panel's pixels.
template <class A>
void load_row(const AnyTensor& tensor, int64_t channel, const Addresses<A>& addresses, A* row) {
  with_type(tensor, [&](auto* data) { load_row_of(data + channel * tensor.stride[1], addresses, row); });
}

// n channels, from `channel` on; channels that lie side by side are read as vectors and transposed.
template <class A>
void load_rows(const AnyTensor& tensor, int64_t channel, int64_t n, const Addresses<A>& addresses, A* rows) {
  constexpr int L = kLanes<A>;
  with_type(tensor, [&](auto* data) {
    data += channel * tensor.stride[1];
    int64_t c = 0;
    if constexpr (sizeof(to_accumulate(*data)) == sizeof(A)) {
      for (; tensor.stride[1] == 1 && c + L <= n; c += L)
        for (int half = 0; half < kPanel<A>; half += L) {
          Vec<A> square[L];
          for (int i = 0; i < L; ++i) square[i] = load(data + addresses.at[half + i] + c);
          transpose(square);
          for (int i = 0; i < L; ++i) store(rows + (c + i) * kPanel<A> + half, square[i]);
        }
    }
    for (; c < n; ++c) load_row_of(data + c * tensor.stride[1], addresses, rows + c * kPanel<A>);
  });
}

// ---- positions ------------------------------------------------------------------------------------------------------

// Bits of `valid`: corners inside the input.
enum Corner : int32_t { kUpperLeft = 1, kUpperRight = 2, kLowerLeft = 4, kLowerRight = 8, kAllCorners = 15 };

template <class A>
struct Positions {
  int32_t y[kPanel<A>], x[kPanel<A>];    // of the upper left corner
  A fy[kPanel<A>], fx[kPanel<A>];        // how far the sample is below and right of it, in [0, 1)
  A mask[kPanel<A>];
  int32_t valid[kPanel<A>];
};

// Both coordinates of the samples of one kernel element. A sample exactly on the line one pixel before the first counts
// as outside, so its corner of weight zero is not read, except for derivatives, which there are those to the right.
// torchvision has it so.
template <class A, bool kDerivative>
void find_positions(const DeformConv2dShape& s, const Pixels<A>& pixels, const A* offset_y, const A* offset_x,
                    int64_t tap, Positions<A>& to) {
  const int32_t shift_y = int32_t(tap / s.kernel_w * s.dilation_h), shift_x = int32_t(tap % s.kernel_w * s.dilation_w);
  const int32_t height = int32_t(s.height), width = int32_t(s.width);
  for (int i = 0; i < kPanel<A>; ++i) {
    const A y = A(pixels.window_y[i] + shift_y) + offset_y[i], x = A(pixels.window_x[i] + shift_x) + offset_x[i];
    int32_t upper, lower, left, right;
    split(y, height, &to.y[i], &to.fy[i], &upper, &lower);
    split(x, width, &to.x[i], &to.fx[i], &left, &right);
    const int32_t inside = kDerivative ? 1 : (y > A(-1)) & (x > A(-1));
    to.valid[i] = inside * (kUpperLeft * (upper & left) | kUpperRight * (upper & right) | kLowerLeft * (lower & left) |
                            kLowerRight * (lower & right));
  }
  for (int i = 0; i < kPanel<A>; ++i) {
    const A y = A(pixels.window_y[i] + shift_y) + offset_y[i], x = A(pixels.window_x[i] + shift_x) + offset_x[i];
    const bool nan = y != y || x != x || (!to.valid[i] && to.mask[i] != to.mask[i]);
    if (__builtin_expect(nan, 0)) {
      to.y[i] = to.x[i] = 0;
      to.fy[i] = to.fx[i] = A(__builtin_nan(""));
      to.valid[i] = kUpperLeft;
    }
    if (i >= pixels.count) to.valid[i] = 0;
  }
}

// The positions of kernel element `tap` for an offset group, read from the offset and mask tensors.
template <class A, bool kDerivative>
void read_positions(const DeformConv2dShape& s, const Pixels<A>& pixels, const AnyTensor& offset,
                    const Addresses<A>& offset_at, const AnyTensor& mask, const Addresses<A>& mask_at, int64_t group,
                    int64_t tap, Positions<A>& to) {
  A offset_y[kPanel<A>], offset_x[kPanel<A>];
  const int64_t channel = group * s.taps() + tap;
  load_row(offset, 2 * channel, offset_at, offset_y);
  load_row(offset, 2 * channel + 1, offset_at, offset_x);
  if (mask.data)
    load_row(mask, channel, mask_at, to.mask);
  else
    for (int i = 0; i < kPanel<A>; ++i) to.mask[i] = 1;
  find_positions<A, kDerivative>(s, pixels, offset_y, offset_x, tap, to);
}

// ---- taps for planes ------------------------------------------------------------------------------------------------

// A sample reads plane[base + 0], [base + 1] (the upper pair) and the same a row below, always inside the plane. At the
// border the pair is moved inwards and the weights with it; `keep` is zero where a number read is no corner of the
// sample.
template <class A>
struct alignas(64) PairTaps {
  using Bits = SameSize<A>;
  A upper[2 * kPanel<A>], lower[2 * kPanel<A>];            // weights
  Bits keep_upper[2 * kPanel<A>], keep_lower[2 * kPanel<A>];
  int64_t base[kPanel<A>];
  bool all_inside;
};

// From what belongs to the low and the high corner along one axis to what belongs to the two numbers of a pair: `shift`
// is how far the low corner is right of the first number; a number that is no corner gets zero. (Where it is further
// than 1, no corner is inside, and `keep` is zero.)
template <class V>
FASTCV_INLINE void place(int32_t shift, V low, V high, V* first, V* second) {
  *first = shift == 0 ? low : shift < 0 ? high : V(0);
  *second = shift == 0 ? high : shift > 0 ? low : V(0);
}

// The first of the two rows or columns that are read.
FASTCV_INLINE int32_t first_of_pair(int32_t low, int32_t size) {
  const int32_t last = size > 1 ? size - 2 : 0;
  return low < 0 ? 0 : low > last ? last : low;
}

// Distance of the two rows that a sample reads.
FASTCV_INLINE int64_t pair_row_step(const DeformConv2dShape& s, const int64_t* stride) {
  return s.height > 1 ? stride[2] : 0;
}

// Weight of the low and of the high corner along an axis, and its derivative with respect to the position.
struct Bilinear {
  template <class A>
  FASTCV_INLINE void operator()(A fraction, A* low, A* high) const {
    *low = 1 - fraction, *high = fraction;
  }
};
struct Slope {
  template <class A>
  FASTCV_INLINE void operator()(A, A* low, A* high) const {
    *low = -1, *high = 1;
  }
};

// upper, lower = weights of the pairs' numbers: weight_y times weight_x, times the mask where it is to modulate.
template <class A, class WeightY, class WeightX>
void pair_weights(const DeformConv2dShape& s, const Positions<A>& from, const PairTaps<A>& taps, bool modulate,
                  WeightY weight_y, WeightX weight_x, A* upper, A* lower) {
  for (int i = 0; i < kPanel<A>; ++i) {
    A low, high, y0, y1, x0, x1;
    weight_y(from.fy[i], &low, &high);
    place(from.y[i] - first_of_pair(from.y[i], int32_t(s.height)), low, high, &y0, &y1);
    weight_x(from.fx[i], &low, &high);
    place(from.x[i] - first_of_pair(from.x[i], int32_t(s.width)), low, high, &x0, &x1);
    const A scale = modulate ? from.mask[i] : A(1);
    upper[2 * i] = taps.keep_upper[2 * i] ? y0 * x0 * scale : 0;
    upper[2 * i + 1] = taps.keep_upper[2 * i + 1] ? y0 * x1 * scale : 0;
    lower[2 * i] = taps.keep_lower[2 * i] ? y1 * x0 * scale : 0;
    lower[2 * i + 1] = taps.keep_lower[2 * i + 1] ? y1 * x1 * scale : 0;
  }
}

template <class A>
void make_pair_taps(const DeformConv2dShape& s, const int64_t* stride, const Pixels<A>& pixels,
                    const Positions<A>& from, bool modulate, PairTaps<A>& to) {
  using Bits = typename PairTaps<A>::Bits;
  int32_t all = kAllCorners;
  for (int i = 0; i < kPanel<A>; ++i) {
    const int32_t y = first_of_pair(from.y[i], int32_t(s.height)), x = first_of_pair(from.x[i], int32_t(s.width));
    to.base[i] = pixels.image[i] * stride[0] + y * stride[2] + x;
    all &= from.valid[i];
    int32_t upper, lower, left, right;
    place(from.y[i] - y, from.valid[i] & 3, from.valid[i] >> 2, &upper, &lower);
    place(from.x[i] - x, upper & 1, upper >> 1, &left, &right);
    to.keep_upper[2 * i] = Bits(-left), to.keep_upper[2 * i + 1] = Bits(-right);
    place(from.x[i] - x, lower & 1, lower >> 1, &left, &right);
    to.keep_lower[2 * i] = Bits(-left), to.keep_lower[2 * i + 1] = Bits(-right);
  }
  to.all_inside = all == kAllCorners;
  pair_weights(s, from, to, modulate, Bilinear{}, Bilinear{}, to.upper, to.lower);
}

// ---- taps for channels-last -----------------------------------------------------------------------------------------

// A sample reads pixels base, base + stride_x, base + stride_y and base + stride_y + stride_x, each only where valid.
template <class A>
struct alignas(64) CornerTaps {
  A weight[4][kPanel<A>];  // upper left, upper right, lower left, lower right
  int64_t base[kPanel<A>];
  int32_t valid[kPanel<A>];
};

template <class A>
void make_corner_taps(const int64_t* stride, const Pixels<A>& pixels, const Positions<A>& from, bool modulate,
                      CornerTaps<A>& to) {
  for (int i = 0; i < kPanel<A>; ++i) {
    to.base[i] = pixels.image[i] * stride[0] + from.y[i] * stride[2] + from.x[i] * stride[3];
    to.valid[i] = from.valid[i];
    const A scale = modulate ? from.mask[i] : A(1);
    const A upper = (1 - from.fy[i]) * scale, lower = from.fy[i] * scale, right = from.fx[i], left = 1 - right;
    to.weight[0][i] = upper * left, to.weight[1][i] = upper * right;
    to.weight[2][i] = lower * left, to.weight[3][i] = lower * right;
  }
}

}  // namespace
}  // namespace fastcv::FASTCV_ISA
