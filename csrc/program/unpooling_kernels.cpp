// Max pooling with indices, and unpooling by them, of windows side by side: a byte for each value counts the pixels of
// its window, i * KW + j. The bytes lie behind the channels of their pixel, so that both are one value of the program.
//
// Vectors run over channels. Bytes of memory bound both: for a window of 2x2, 16 are read and 5 written for each value
// of pooling, and the other way round for unpooling.
#include "../common/pool_lanes.h"
#include "steps_tasks.h"

namespace fastcv::FASTCV_ISA {
namespace {

using Index = Position<float>;

const uint8_t* indices(const float* pixel) { return reinterpret_cast<const uint8_t*>(pixel); }

// p: kernel_h, kernel_w, which are the strides too. The last windows of a row or column may end outside the map.
void pool_row(const StepTask& t, int64_t image, int64_t oy) {
  const int64_t rows = min_of(t.p[0], t.in.h - oy * t.p[0]);
  float* out = pixel(t.y, image, oy, 0);
  for (int64_t ox = 0; ox < t.out.w; ++ox, out += t.y.stride_x) {
    const int64_t columns = min_of(t.p[1], t.in.w - ox * t.p[1]);
    const float* window = pixel(t.a, image, oy * t.p[0], ox * t.p[1]);
    uint8_t* winners = reinterpret_cast<uint8_t*>(out + t.in.c);
    each_vector(t.in.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
      Vec<float> most = load_some(window + c, n);
      Vec<Index> winner{};
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const Vec<float> value = load_some(window + i * t.a.stride_y + j * t.a.stride_x + c, n);
          take_greater(value, Vec<Index>{} + Index(i * t.p[1] + j), most, winner);
        }
      store_some(out + c, most, n);
      store_indices<Index>(winners + c, winner, n);
    });
  }
}

void unpool_row(const StepTask& t, int64_t image, int64_t y) {
  const int64_t kw = t.p[1], oy = y / t.p[0], first = y % t.p[0] * kw;  // index of the row's first pixel in a window
  float* out = pixel(t.y, image, y, 0);
  for (int64_t x = 0; x < t.out.w;) {
    const bool inside = oy < t.in.h && x / kw < t.in.w;
    const int64_t columns = inside ? min_of(kw, t.out.w - x) : t.out.w - x;
    const float* from = inside ? pixel(t.a, image, oy, x / kw) : nullptr;
    const uint8_t* winners = inside ? indices(pixel(t.b, image, oy, x / kw)) : nullptr;
    each_vector(t.out.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
      const Vec<float> value = inside ? load_some(from + c, n) : Vec<float>{};
      const Vec<Index> winner = inside ? load_indices<Index>(winners + c, LaneRange{0, n}) : Vec<Index>{};
      for (int64_t j = 0; j < columns; ++j)
        store_some(out + j * t.y.stride_x + c, winner == Index(first + j) ? value : Vec<float>{}, n);
    });
    x += columns, out += columns * t.y.stride_x;
  }
}

}  // namespace

int64_t step_max_pool_indices_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_max_pool_indices(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) { pool_row(t, image, y); });
}

int64_t step_max_unpool_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_max_unpool(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) { unpool_row(t, image, y); });
}

}  // namespace fastcv::FASTCV_ISA
