// Orders boxes so that neighbours in the plane are neighbours in memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "radix_sort.h"

namespace fastcv {

// The bits of a number below 2^16 with a zero before each.
inline uint32_t spread_bits(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ff;
  x = (x | x << 4) & 0x0f0f0f0f;
  x = (x | x << 2) & 0x33333333;
  return (x | x << 1) & 0x55555555;
}

// Rows of boxes [N, 4] along a Z-order curve over their centres. The order decides only how fast a kernel runs, so a
// grid of 1024 x 1024 cells is fine enough and infinite boxes may lie anywhere.
template <class T>
std::vector<int32_t> spatial_order(const T* boxes, const std::vector<int32_t>& rows) {
  double low[2], high[2];
  for (int d : {0, 1}) low[d] = std::numeric_limits<double>::infinity(), high[d] = -low[d];
  for (int32_t row : rows)
    for (int d : {0, 1}) {
      const double centre = 0.5 * double(boxes[4 * int64_t(row) + d]) + 0.5 * double(boxes[4 * int64_t(row) + d + 2]);
      if (!std::isfinite(centre)) continue;
      low[d] = std::min(low[d], centre), high[d] = std::max(high[d], centre);
    }
  std::vector<Keyed<uint32_t>> keyed(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    uint32_t cell[2];
    for (int d : {0, 1}) {
      const double centre =
          0.5 * double(boxes[4 * int64_t(rows[i]) + d]) + 0.5 * double(boxes[4 * int64_t(rows[i]) + d + 2]);
      const double position = (centre - low[d]) / (high[d] - low[d]) * 1023;
      cell[d] = position > 0 ? uint32_t(std::min(position, 1023.0)) : 0;  // NaN too
    }
    keyed[i] = {spread_bits(cell[0]) | spread_bits(cell[1]) << 1, rows[i]};
  }
  radix_sort(keyed);
  std::vector<int32_t> ordered(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) ordered[i] = keyed[i].row;
  return ordered;
}

}  // namespace fastcv
