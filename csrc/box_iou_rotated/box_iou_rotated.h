// Intersection over union of two rotated boxes.
//
// They are compared in the frame of the first, where it is the rectangle |x| <= W, |y| <= H and the second a polygon of
// four edges. A vertical line meets the intersection in the part of it between the polygon's edges, clamped to [-H, H],
// so by Green's theorem twice the area is the sum over edges of the integral of -2 clamp(y, -H, H) dx, over the edge
// within |x| <= W: linear in three pieces. No points are collected or sorted, so nothing degenerates where corners or
// edges coincide. 8 divisions and about 150 other operations; most pairs are told apart by their distance.
//
// V: double, or a vector of them, of which each lane is a pair.
#pragma once

#include "../common/angles.h"

namespace fastcv {

// Without an area, or with an infinite one: half_w = half_h = 0, which overlaps nothing.
template <class V>
struct RotatedBox {
  V cx, cy, half_w, half_h, cos, sin;
};

// Of five numbers: centre, width, height, and the angle in degrees, counter-clockwise on the screen.
FASTCV_HOST_DEVICE inline RotatedBox<double> rotated_box(const double* p) {
  const double area = p[2] * p[3];
  const bool nothing = area <= 0 || area > 1.7976931348623157e308;
  RotatedBox<double> box{p[0], p[1], nothing ? 0 : std::fabs(p[2]) / 2, nothing ? 0 : std::fabs(p[3]) / 2, 0, 0};
  sin_cos_of_degrees(p[4], &box.sin, &box.cos);
  return box;
}

FASTCV_HOST_DEVICE inline bool has_nan(const RotatedBox<double>& b) {
  return b.cx != b.cx || b.cy != b.cy || b.half_w != b.half_w || b.half_h != b.half_h || b.cos != b.cos;
}

#define FASTCV_ROTATED FASTCV_HOST_DEVICE inline __attribute__((always_inline))

// Centres are farther apart than the circumscribed circles reach, r + s <= sqrt(2 (r^2 + s^2)); false for a NaN.
template <class V>
FASTCV_ROTATED auto are_apart(const RotatedBox<V>& a, const RotatedBox<V>& b) {
  const V dx = b.cx - a.cx, dy = b.cy - a.cy;
  const V squares = a.half_w * a.half_w + a.half_h * a.half_h + b.half_w * b.half_w + b.half_h * b.half_h;
  return dx * dx + dy * dy > squares * 2.02;  // with what rounding takes
}

// Keeps NaN.
template <class V>
FASTCV_ROTATED V clamped(V x, V limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

// Twice the integral of clamp(y, -half_h, half_h) dx from a to b within |x| <= half_w.
template <class V>
FASTCV_ROTATED V edge_integral(V xa, V ya, V xb, V yb, V half_w, V half_h) {
  const V one = V{} + 1.0, start = clamped(xa, half_w), end = clamped(xb, half_w), width = end - start;
  const V slope = (yb - ya) / (width == 0.0 ? one : xb - xa);
  ya += (start - xa) * slope, yb -= (xb - end) * slope;
  const V low = clamped(ya, half_h), high = clamped(yb, half_h), rise = high - low, total = low + high;
  return width * (total - rise * ((total - ya - yb) / (rise == 0.0 ? one : yb - ya)));
}

template <class V>
FASTCV_ROTATED V rotated_intersection(const RotatedBox<V>& a, const RotatedBox<V>& b) {
  const V one = V{} + 1.0, dx = b.cx - a.cx, dy = b.cy - a.cy;
  const V cx = dx * a.cos - dy * a.sin, cy = dx * a.sin + dy * a.cos;
  const V sin = b.sin * a.cos - b.cos * a.sin, turned = b.cos * a.cos + b.sin * a.sin;
  const V cos = sin == 0.0 ? (turned < 0.0 ? -one : one) : turned;  // parallel edges are exactly so
  const V wx = b.half_w * cos, wy = -b.half_w * sin, hx = b.half_h * sin, hy = b.half_h * cos;
  const V x0 = cx - wx - hx, x1 = cx + wx - hx, x2 = cx + wx + hx, x3 = cx - wx + hx;
  const V y0 = cy - wy - hy, y1 = cy + wy - hy, y2 = cy + wy + hy, y3 = cy - wy + hy;
  const V sum = edge_integral(x0, y0, x1, y1, a.half_w, a.half_h) + edge_integral(x1, y1, x2, y2, a.half_w, a.half_h) +
                edge_integral(x2, y2, x3, y3, a.half_w, a.half_h) + edge_integral(x3, y3, x0, y0, a.half_w, a.half_h);
  return sum * -0.5;
}

// In [0, 1]; a NaN gives NaN.
template <class V>
FASTCV_ROTATED V rotated_iou(const RotatedBox<V>& a, const RotatedBox<V>& b) {
  const V zero{}, area_a = a.half_w * a.half_h * 4.0, area_b = b.half_w * b.half_h * 4.0;
  const V least = area_a < area_b ? area_a : area_b, meant = rotated_intersection(a, b);
  const V exists = meant <= area_a * 1e-14 ? zero : meant;  // of boxes apart it is what rounding leaves
  const V common = exists > least ? least : exists;
  const V iou = common / (area_a + area_b - common);
  return least <= 0.0 ? zero : iou;
}

}  // namespace fastcv
