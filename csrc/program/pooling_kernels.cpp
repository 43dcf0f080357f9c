// Steps that compute an output pixel from a window of the input: pooling and resizing. Vectors run over channels.
#include "../common/positions.h"
#include "steps_tasks.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kPoolChannels = 256;  // of a task of adaptive pooling

// p of pooling: kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, count_include_pad.
struct Window {
  int64_t y0, y1, x0, x1;  // of the input, clipped
};

// Where an output coordinate of bilinear resizing lies between two of the input.
struct Between {
  int64_t low, high;
  float part;  // of the way from low to high
};

FASTCV_INLINE Between between(int64_t at, float ratio, bool align_corners, int64_t size) {
  const float source = align_corners ? ratio * float(at) : ratio * (float(at) + 0.5f) - 0.5f;
  const float clipped = source > 0 ? source : 0;
  const int64_t low = min_of(int64_t(clipped), size - 1);
  const float part = clipped - float(low);
  return {low, min_of(low + 1, size - 1), part < 1 ? part : 1};
}

void resize_row_bilinear(const StepTask& t, int64_t image, int64_t y) {
  const bool align_corners = t.p[1] != 0;
  const Between v = between(y, float(t.ratio_h), align_corners, t.in.h);
  const float *top = pixel(t.a, image, v.low, 0), *bottom = pixel(t.a, image, v.high, 0);
  float* out = pixel(t.y, image, y, 0);
  for (int64_t x = 0; x < t.out.w; ++x, out += t.y.stride_x) {
    const Between u = between(x, float(t.ratio_w), align_corners, t.in.w);
    const float a = (1 - v.part) * (1 - u.part), b = (1 - v.part) * u.part, c = v.part * (1 - u.part),
                d = v.part * u.part;
    const int64_t left = u.low * t.a.stride_x, right = u.high * t.a.stride_x;
    each_vector(t.out.c, [&](int64_t k, int n) FASTCV_INLINE_LAMBDA {
      store_some(out + k,
                 a * load_some(top + left + k, n) + b * load_some(top + right + k, n) +
                     c * load_some(bottom + left + k, n) + d * load_some(bottom + right + k, n),
                 n);
    });
  }
}

void resize_row_nearest(const StepTask& t, int64_t image, int64_t y) {
  const float* from = pixel(t.a, image, nearest(y, float(t.ratio_h), t.in.h), 0);
  float* out = pixel(t.y, image, y, 0);
  for (int64_t x = 0; x < t.out.w; ++x, out += t.y.stride_x) {
    const float* p = from + nearest(x, float(t.ratio_w), t.in.w) * t.a.stride_x;
    each_vector(t.out.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA { store_some(out + c, load_some(p + c, n), n); });
  }
}

}  // namespace

int64_t step_max_pool_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_max_pool(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t oy) {
    float* out = pixel(t.y, image, oy, 0);
    for (int64_t ox = 0; ox < t.out.w; ++ox, out += t.y.stride_x) {
      const float* taps[64];  // of the window, inside the map
      const int64_t y0 = oy * t.p[2] - t.p[4], x0 = ox * t.p[3] - t.p[5];
      int count = 0;
      each_vector(t.out.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
        Vec<float> most = broadcast(-__builtin_inff());
        if (c == 0 || t.p[0] * t.p[1] > 64) {
          for (int64_t i = 0; i < t.p[0]; ++i)
            for (int64_t j = 0; j < t.p[1]; ++j) {
              const int64_t y = y0 + i * t.p[6], x = x0 + j * t.p[7];
              if (y < 0 || y >= t.in.h || x < 0 || x >= t.in.w) continue;
              const float* tap = pixel(t.a, image, y, x);
              most = greater_of(load_channels(t.a.packed, tap, c, n), most);
              if (count < 64) taps[count++] = tap;
            }
        } else {
          for (int i = 0; i < count; ++i) most = greater_of(load_channels(t.a.packed, taps[i], c, n), most);
        }
        store_channels(t.y.packed, out, c, most, n);
      });
    }
  });
}

int64_t step_avg_pool_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_avg_pool(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t oy) {
    float* out = pixel(t.y, image, oy, 0);
    const int64_t y0 = oy * t.p[2] - t.p[4], y1 = min_of(y0 + t.p[0], t.in.h + t.p[4]);
    for (int64_t ox = 0; ox < t.out.w; ++ox, out += t.y.stride_x) {
      const int64_t x0 = ox * t.p[3] - t.p[5], x1 = min_of(x0 + t.p[1], t.in.w + t.p[5]);
      const Window w{max_of(y0, 0), min_of(y1, t.in.h), max_of(x0, 0), min_of(x1, t.in.w)};
      const int64_t count = t.p[8] ? (y1 - y0) * (x1 - x0) : (w.y1 - w.y0) * (w.x1 - w.x0);
      each_vector(t.out.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
        Vec<float> sum{};
        for (int64_t y = w.y0; y < w.y1; ++y)
          for (int64_t x = w.x0; x < w.x1; ++x) sum += load_some(pixel(t.a, image, y, x) + c, n);
        store_some(out + c, sum / float(count), n);
      });
    }
  });
}

// Tasks are output rows times pieces of the channels: the common output is one pixel.
int64_t step_adaptive_avg_pool_tasks(const StepTask& t) {
  return t.out.n * t.out.h * ((t.out.c + kPoolChannels - 1) / kPoolChannels);
}
void step_adaptive_avg_pool(const StepTask& t, int64_t begin, int64_t end) {
  const int64_t pieces = (t.out.c + kPoolChannels - 1) / kPoolChannels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c0 = i % pieces * kPoolChannels, channels = min_of(kPoolChannels, t.out.c - c0);
    const int64_t image = i / pieces / t.out.h, oy = i / pieces % t.out.h;
    const int64_t y0 = oy * t.in.h / t.out.h, y1 = ((oy + 1) * t.in.h + t.out.h - 1) / t.out.h;
    for (int64_t ox = 0; ox < t.out.w; ++ox) {
      const int64_t x0 = ox * t.in.w / t.out.w, x1 = ((ox + 1) * t.in.w + t.out.w - 1) / t.out.w;
      each_vector(channels, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
        Vec<float> sum{};
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) sum += load_some(pixel(t.a, image, y, x) + c0 + c, n);
        store_some(pixel(t.y, image, oy, ox) + c0 + c, sum / float((y1 - y0) * (x1 - x0)), n);
      });
    }
  }
}

// p: bilinear, align_corners.
int64_t step_resize_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_resize(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) {
    if (t.p[0])
      resize_row_bilinear(t, image, y);
    else
      resize_row_nearest(t, image, y);
  });
}

}  // namespace fastcv::FASTCV_ISA
