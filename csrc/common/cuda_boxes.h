// Boxes in the CUDA kernels of the suppression family, with the operations of torchvision's nms in their order. Files
// that include this are compiled without fused multiply-adds: their decisions are those of the CPU, and a copy of a box
// has an IoU of 1 with it.
#pragma once

#include <cmath>
#include <limits>

#include "cuda_launch.h"

namespace fastcv::cuda {

template <class T>
struct alignas(16) Box {
  T x1, y1, x2, y2;
};

// Of a tensor [N, 4], which may begin anywhere.
template <class T>
__device__ Box<T> load_box(const T* boxes, int64_t row) {
  const T* b = boxes + row * 4;
  return {b[0], b[1], b[2], b[3]};
}

template <class T>
__device__ bool has_nan(const Box<T>& b) {
  return b.x1 != b.x1 || b.y1 != b.y1 || b.x2 != b.x2 || b.y2 != b.y2;
}

// Its IoU with any box is NaN, and it touches none.
template <class T>
__device__ Box<T> no_box() {
  const T nan = T(__builtin_nan(""));
  return {nan, nan, nan, nan};
}

template <class T>
__device__ T not_negative(T x) {
  return x < 0 ? T(0) : x;  // NaN stays NaN
}

template <class T>
__device__ T area(const Box<T>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

template <class T>
__device__ T intersection(const Box<T>& a, const Box<T>& b) {
  const T left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
  const T top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
  return not_negative(right - left) * not_negative(bottom - top);
}

template <class T>
__device__ T iou(const Box<T>& a, const Box<T>& b) {
  const T common = intersection(a, b);
  return common / (area(a) + area(b) - common);
}

// Holds for all boxes that overlap, and for few others: four comparisons pass over most boxes.
template <class T>
__device__ bool touches(const Box<T>& a, const Box<T>& b) {
  return a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2;
}

// The largest T not above x, so that comparing with it decides as comparing with x does.
template <class T>
T round_down(double x) {
  const T y = T(x);
  return double(y) > x ? std::nextafter(y, -std::numeric_limits<T>::infinity()) : y;
}

}  // namespace fastcv::cuda
