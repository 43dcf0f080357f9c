// Steps that compute each output pixel from the same pixel of their inputs. Memory bounds them: they are bands of rows,
// one vector of channels after the other.
#include "steps_tasks.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int L = kLanes<float>;

// f(x, c, n, image) of every vector of the input.
template <class F>
FASTCV_INLINE void map_pixels(const StepTask& t, int64_t begin, int64_t end, const F& f) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) FASTCV_INLINE_LAMBDA {
    const float* a = pixel(t.a, image, y, 0);
    float* out = pixel(t.y, image, y, 0);
    for (int64_t x = 0; x < t.out.w; ++x, a += t.a.stride_x, out += t.y.stride_x)
      each_vector(t.out.c,
                  [&](int64_t c, int n) FASTCV_INLINE_LAMBDA { store_some(out + c, f(load_some(a + c, n), c, n), n); });
  });
}

// The second input has the size of the first, or is resized to it.
template <class F>
FASTCV_INLINE void combine(const StepTask& t, int64_t begin, int64_t end, const F& f) {
  const float ratio_h = float(t.in2.h) / float(t.out.h), ratio_w = float(t.in2.w) / float(t.out.w);
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) FASTCV_INLINE_LAMBDA {
    const float *a = pixel(t.a, image, y, 0), *row = pixel(t.b, image, nearest(y, ratio_h, t.in2.h), 0);
    float* out = pixel(t.y, image, y, 0);
    for (int64_t x = 0; x < t.out.w; ++x, a += t.a.stride_x, out += t.y.stride_x) {
      const float* b = row + nearest(x, ratio_w, t.in2.w) * t.b.stride_x;
      each_vector(t.out.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
        const Vec<float> sum = f(load_channels(t.a.packed, a, c, n), load_channels(t.b.packed, b, c, n));
        store_channels(t.y.packed, out, c, activate(sum, t.activation, t.slope), n);
      });
    }
  });
}

void copy_channels(const float* from, int64_t n, float* to) {
  each_vector(n, [&](int64_t c, int m) FASTCV_INLINE_LAMBDA { store_some(to + c, load_some(from + c, m), m); });
}

// Sum of f over the channels of a pixel.
template <class F>
FASTCV_INLINE float sum_channels(const float* p, int64_t channels, const F& f) {
  Vec<float> sum{};
  each_vector(channels, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
    Vec<float> value = f(load_some(p + c, n));
    if (n < L) {
      float lanes[L] = {};
      store_first(lanes, value, n);
      value = load(lanes);
    }
    sum += value;
  });
  float total = 0;
  for (int i = 0; i < L; ++i) total += sum[i];
  return total;
}

}  // namespace

int64_t step_add_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_add(const StepTask& t, int64_t begin, int64_t end) {
  combine(t, begin, end, [](Vec<float> a, Vec<float> b) FASTCV_INLINE_LAMBDA { return a + b; });
}

int64_t step_mul_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_mul(const StepTask& t, int64_t begin, int64_t end) {
  combine(t, begin, end, [](Vec<float> a, Vec<float> b) FASTCV_INLINE_LAMBDA { return a * b; });
}

int64_t step_activate_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_activate(const StepTask& t, int64_t begin, int64_t end) {
  map_pixels(t, begin, end,
             [&](Vec<float> x, int64_t, int) FASTCV_INLINE_LAMBDA { return activate(x, t.activation, t.slope); });
}

int64_t step_affine_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_affine(const StepTask& t, int64_t begin, int64_t end) {
  map_pixels(t, begin, end, [&](Vec<float> x, int64_t c, int n) FASTCV_INLINE_LAMBDA {
    return activate(fma(x, load_some(t.scale + c, n), load_some(t.shift + c, n)), t.activation, t.slope);
  });
}

int64_t step_prelu_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_prelu(const StepTask& t, int64_t begin, int64_t end) {
  map_pixels(t, begin, end, [&](Vec<float> x, int64_t c, int n) FASTCV_INLINE_LAMBDA {
    return x > 0 ? x : x * load_some(t.scale + c, n);
  });
}

int64_t step_copy_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_copy(const StepTask& t, int64_t begin, int64_t end) {
  map_pixels(t, begin, end, [](Vec<float> x, int64_t, int) FASTCV_INLINE_LAMBDA { return x; });
}

int64_t step_interleave_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_interleave(const StepTask& t, int64_t begin, int64_t end) {
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) {
    const float *a = pixel(t.a, image, y, 0), *b = pixel(t.b, image, y, 0);
    float* out = pixel(t.y, image, y, 0);
    for (int64_t x = 0; x < t.out.w; ++x, a += t.a.stride_x, b += t.b.stride_x, out += t.y.stride_x)
      for (int64_t c = 0; c < t.in.c; ++c) out[2 * c] = a[c], out[2 * c + 1] = b[c];
  });
}

// Tasks are pieces of the channels of an image: 16 lines of the output are written side by side, those of the input
// read once.
constexpr int64_t kFlattened = 64;  // channels of a task

int64_t step_flatten_tasks(const StepTask& t) { return t.in.n * ((t.in.c + kFlattened - 1) / kFlattened); }
void step_flatten(const StepTask& t, int64_t begin, int64_t end) {
  const int64_t pixels = t.in.h * t.in.w, pieces = (t.in.c + kFlattened - 1) / kFlattened;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / pieces, first = i % pieces * kFlattened, last = min_of(t.in.c, first + kFlattened);
    float* out = pixel(t.y, image, 0, 0) + first * pixels;
    if (pixels == 1) {
      copy_channels(pixel(t.a, image, 0, 0) + first, last - first, out);
      continue;
    }
    for (int64_t y = 0; y < t.in.h; ++y)
      for (int64_t x = 0; x < t.in.w; ++x) {
        const float* from = pixel(t.a, image, y, x);
        float* to = out + y * t.in.w + x;
        for (int64_t c = first; c < last; ++c, to += pixels) *to = from[c];
      }
  }
}

int64_t step_layer_norm_tasks(const StepTask& t) { return band_tasks(t.out); }
void step_layer_norm(const StepTask& t, int64_t begin, int64_t end) {
  const float channels = float(t.in.c);
  each_row(t.out, begin, end, [&](int64_t image, int64_t y) {
    const float* a = pixel(t.a, image, y, 0);
    float* out = pixel(t.y, image, y, 0);
    for (int64_t x = 0; x < t.out.w; ++x, a += t.a.stride_x, out += t.y.stride_x) {
      const float mean = sum_channels(a, t.in.c, [](Vec<float> v) FASTCV_INLINE_LAMBDA { return v; }) / channels;
      const float squares =
          sum_channels(a, t.in.c, [&](Vec<float> v) FASTCV_INLINE_LAMBDA { return (v - mean) * (v - mean); });
      const float inverse = 1.0f / __builtin_sqrtf(squares / channels + t.eps);
      each_vector(t.in.c, [&](int64_t c, int n) FASTCV_INLINE_LAMBDA {
        Vec<float> v = (load_some(a + c, n) - mean) * inverse;
        if (t.scale) v = v * load_some(t.scale + c, n);
        if (t.shift) v = v + load_some(t.shift + c, n);
        store_some(out + c, v, n);
      });
    }
  });
}

}  // namespace fastcv::FASTCV_ISA
