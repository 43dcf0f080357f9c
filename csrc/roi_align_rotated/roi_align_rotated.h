// RoIAlign of rotated regions (He et al., "Mask R-CNN", ICCV 2017, section 3, in the frame of the region; Ma et al.,
// "Arbitrary-oriented scene text detection via rotation proposals", IEEE Transactions on Multimedia 20(11), 2018): each
// bin is the mean of bilinear samples on a grid that is turned with the region.
//
// A turned grid is no product of a vertical and a horizontal one, so that every sample has four taps of its own.
#pragma once

#include <cstdint>

#include "../common/angles.h"
#include "../common/cpu_isa.h"

namespace fastcv {

// Four pixels with their weights: (y, x), the one right of it, the one below, and the one below right.
template <class W>
struct BilinearTap {
  int32_t y, x, right, down;  // right, down: 1, or 0 at the border of the map
  W weight[4];
};

// One region, in pixels of the feature map.
template <class C>
struct RotatedRegion {
  C cx, cy, cos, sin, top, left, bin_h, bin_w;  // top, left: of the first bin, from the centre in the region's frame
  int64_t grid_h, grid_w;                       // samples of a bin; 0: none (an empty or non-finite region)

  // box: centre, width, height and angle in degrees, counter-clockwise on the screen.
  FASTCV_HOST_DEVICE RotatedRegion(const C* box, C scale, bool aligned, bool clockwise, int64_t pooled_height,
                                   int64_t pooled_width, int64_t sampling_ratio) {
    const C offset = aligned ? C(0.5) : 0;
    cx = box[0] * scale - offset, cy = box[1] * scale - offset;
    C width = box[2] * scale, height = box[3] * scale;
    if (!aligned && width < 1) width = 1;
    if (!aligned && height < 1) height = 1;
    sin_cos_of_degrees(box[4], &sin, &cos);
    if (clockwise) sin = -sin;
    top = -height / 2, left = -width / 2;
    bin_h = height / C(pooled_height), bin_w = width / C(pooled_width);
    const bool exists = std::abs(cx) <= C(1e9) && std::abs(cy) <= C(1e9) && width > 0 && height > 0 &&
                        width <= C(1e6) && height <= C(1e6) && cos == cos;
    grid_h = !exists ? 0 : sampling_ratio > 0 ? sampling_ratio : int64_t(std::ceil(bin_h));
    grid_w = !exists ? 0 : sampling_ratio > 0 ? sampling_ratio : int64_t(std::ceil(bin_w));
  }

  FASTCV_HOST_DEVICE int64_t samples() const { return grid_h * grid_w; }

  // Sample i of bin (ph, pw); false: outside the map.
  template <class W>
  FASTCV_HOST_DEVICE bool sample(int64_t ph, int64_t pw, int64_t i, int64_t height, int64_t width,
                                 BilinearTap<W>* tap) const {
    const C v = top + C(ph) * bin_h + (C(i / grid_w) + C(0.5)) * bin_h / C(grid_h);
    const C u = left + C(pw) * bin_w + (C(i % grid_w) + C(0.5)) * bin_w / C(grid_w);
    C y = v * cos - u * sin + cy, x = v * sin + u * cos + cx;
    if (!(y >= -1 && y <= C(height) && x >= -1 && x <= C(width))) return false;
    if (y < 0) y = 0;
    if (x < 0) x = 0;
    tap->y = int32_t(y), tap->x = int32_t(x), tap->down = tap->right = 1;
    if (tap->y >= height - 1) tap->y = int32_t(height - 1), tap->down = 0, y = C(tap->y);
    if (tap->x >= width - 1) tap->x = int32_t(width - 1), tap->right = 0, x = C(tap->x);
    const C below = y - C(tap->y), beside = x - C(tap->x), inverse = 1 / C(samples());
    tap->weight[0] = W((1 - below) * (1 - beside) * inverse), tap->weight[1] = W((1 - below) * beside * inverse);
    tap->weight[2] = W(below * (1 - beside) * inverse), tap->weight[3] = W(below * beside * inverse);
    return true;
  }
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // out[c] = the weighted sum of the pixels of a map [H, W, C] over n taps, of all channels.
    template <class T>
    void sum_pixels(const T* map, int64_t width, int64_t channels, const BilinearTap<accumulate_t<T>>* taps, int64_t n,
                    T* out);
    // Adds grad[c] times their weights to the pixels of a map [H, W, stride] of some channels.
    template <class A>
    void add_to_pixels(A* map, int64_t width, int64_t stride, int64_t channels, const BilinearTap<A>* taps, int64_t n,
                       const A* grad);)
