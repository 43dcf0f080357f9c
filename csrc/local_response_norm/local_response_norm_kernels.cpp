// The loops of local response normalisation.
//
// A task takes some positions of an image with all their channels: first their squares to scratch memory, then for each
// element the sum of its window, the power, and the product. Windows are summed anew for each element: `size` additions
// of numbers in cache, where a running sum would save two of five but keep the rounding error of what it lost, and
// infinities for ever. Lanes are positions where the features are contiguous, channels where they are channels-last;
// scratch rows have zeros on both sides, so that no loop tests for the border:
//
//   contiguous     [before + C + after][positions], the window's step is a row
//   channels-last  [positions][before + C + after], the window's step is 1
//
// The usual beta, 3/4, is two square roots and a division, 1.7 cycles an element on AVX-512; others need a power
// function. Bytes: an element is read and written once, 8 in float32 (backward: 12), which takes as long from memory.
//
// Backward: dL/dx_i = g_i r_i - 2 factor beta x_i (sum of u_c over those c whose window has i), with r = d^-beta and
// u_c = g_c x_c r_c / d_c. The window of c has i where the mirrored window of i has c.
#include "local_response_norm.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

constexpr int64_t kScratchBytes = 160 * 1024;  // of squares
constexpr int64_t kMostPositions = 512;

template <class V>
FASTCV_INLINE V square_root(V x) {
  constexpr bool kDouble = sizeof(x[0]) == 8;
#if defined(__AVX512F__)
  if constexpr (kDouble) return (V)_mm512_sqrt_pd((__m512d)x);
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  if constexpr (kDouble) return (V)_mm256_sqrt_pd((__m256d)x);
  return (V)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  if constexpr (kDouble) return (V)_mm_sqrt_pd((__m128d)x);
  return (V)_mm_sqrt_ps((__m128)x);
#else
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = kDouble ? __builtin_sqrt(x[i]) : __builtin_sqrtf(x[i]);
  return x;
#endif
}

// d^-beta for the exponents that have a formula, and for any.
struct ThreeQuarters {
  template <class A>
  static FASTCV_INLINE Vec<A> power(Vec<A> d, A) {
    const Vec<A> root = square_root(d);
    return A(1) / (root * square_root(root));
  }
};
struct OneHalf {
  template <class A>
  static FASTCV_INLINE Vec<A> power(Vec<A> d, A) {
    return A(1) / square_root(d);
  }
};
struct One {
  template <class A>
  static FASTCV_INLINE Vec<A> power(Vec<A> d, A) {
    return A(1) / d;
  }
};
struct AnyExponent {
  template <class A>
  static FASTCV_INLINE Vec<A> power(Vec<A> d, A beta) {
    for (int i = 0; i < kLanes<A>; ++i)
      d[i] =
          sizeof(A) == 4 ? A(__builtin_powf(float(d[i]), -float(beta))) : A(__builtin_pow(double(d[i]), -double(beta)));
    return d;
  }
};
template <class A, class F>
FASTCV_INLINE void with_exponent(A beta, const F& f) {
  if (beta == A(0.75)) return f(ThreeQuarters{});
  if (beta == A(0.5)) return f(OneHalf{});
  if (beta == A(1)) return f(One{});
  f(AnyExponent{});
}

// The positions of a task as rows of vectors.
struct Rows {
  int64_t count, length;  // rows, and elements in a row
  int64_t step;           // of scratch memory, from row to row
  int64_t window_step;    // from channel to channel
  bool channels_last;
};

template <class T>
int64_t part_positions(const LocalResponseNorm<T>& task) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const int64_t channels = task.input.channels + task.before + task.after;
  const int64_t most = kScratchBytes / (int64_t(sizeof(Acc<T>)) * max_of(1, channels));
  return max_of(1, min_of(kMostPositions, most) / L) * L;
}

// One buffer of scratch memory, room for the last vector included.
template <class T>
int64_t buffer_size(const LocalResponseNorm<T>& task) {
  constexpr int64_t L = kLanes<Acc<T>>;
  return (part_positions(task) + L) * (task.input.channels + task.before + task.after + L);
}

template <class T>
Rows rows_of(const LocalResponseNorm<T>& task, int64_t positions) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const int64_t channels = task.input.channels;
  if (task.channels_last) return {positions, channels, task.before + channels + task.after + L, 1, true};
  const int64_t step = (positions + L - 1) / L * L;
  return {channels, positions, step, step, false};
}

// Zeros before and after the channels of a filled buffer.
template <class A>
void zero_borders(const Rows& rows, A* buffer, int64_t before, int64_t after) {
  if (!rows.channels_last) {
    memset(buffer, 0, size_t(before * rows.step) * sizeof(A));
    memset(buffer + (before + rows.count) * rows.step, 0, size_t(after * rows.step) * sizeof(A));
    return;
  }
  for (int64_t r = 0; r < rows.count; ++r, buffer += rows.step) {
    for (int64_t i = 0; i < before; ++i) buffer[i] = 0;
    for (int64_t i = before + rows.length; i < before + rows.length + after; ++i) buffer[i] = 0;
  }
}

template <class A>
FASTCV_INLINE Vec<A> window_sum(const A* from, int64_t step, int64_t size) {
  Vec<A> sum = load(from);
  for (int64_t j = 1; j < size; ++j) sum += load(from + j * step);
  return sum;
}

template <class T>
FASTCV_INLINE T* row_of(const FeatureMap<T>& map, const Rows& rows, int64_t image, int64_t first, int64_t row) {
  T* const part = map.data + image * map.stride_n + first * map.stride_x;
  return part + row * (rows.channels_last ? map.stride_x : map.stride_c);
}

template <class T>
void square(const LocalResponseNorm<T>& task, const Rows& rows, int64_t image, int64_t first, Acc<T>* squares) {
  constexpr int64_t L = kLanes<Acc<T>>;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* const x = row_of(task.input, rows, image, first, r);
    Acc<T>* const to = squares + r * rows.step + task.before * rows.window_step;
    for (int64_t i = 0; i < rows.length; i += L) {
      const Vec<Acc<T>> value = load_some(x + i, rows.length - i);
      store(to + i, value * value);
    }
  }
  zero_borders(rows, squares, task.before, task.after);
}

template <class Exponent, class T>
void forward_part(const LocalResponseNorm<T>& task, int64_t image, int64_t first, int64_t positions, Acc<T>* squares) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const Rows rows = rows_of(task, positions);
  const int64_t size = task.before + 1 + task.after;
  const Vec<Acc<T>> factor = broadcast(task.factor), k = broadcast(task.k);
  square(task, rows, image, first, squares);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* const x = row_of(task.input, rows, image, first, r);
    T* const y = row_of(task.output, rows, image, first, r);
    for (int64_t i = 0; i < rows.length; i += L) {
      const Vec<Acc<T>> sum = window_sum(squares + r * rows.step + i, rows.window_step, size);
      const Vec<Acc<T>> scale = Exponent::power(fma(factor, sum, k), task.beta);
      store_some(y + i, load_some(x + i, rows.length - i) * scale, rows.length - i);
    }
  }
}

// `scratch`: squares, then u, then g r, as the head of this file has them.
template <class Exponent, class T>
void backward_part(const LocalResponseNorm<T>& task, int64_t image, int64_t first, int64_t positions, Acc<T>* squares) {
  constexpr int64_t L = kLanes<Acc<T>>;
  const Rows rows = rows_of(task, positions);
  const int64_t size = task.before + 1 + task.after, buffer = buffer_size(task);
  Acc<T>* const u = squares + buffer;
  Acc<T>* const direct = u + buffer;
  const Vec<Acc<T>> factor = broadcast(task.factor), k = broadcast(task.k);
  square(task, rows, image, first, squares);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* const x = row_of(task.input, rows, image, first, r);
    const T* const g = row_of(task.grad, rows, image, first, r);
    for (int64_t i = 0; i < rows.length; i += L) {
      const int64_t at = r * rows.step + i, n = rows.length - i;
      const Vec<Acc<T>> d = fma(factor, window_sum(squares + at, rows.window_step, size), k);
      const Vec<Acc<T>> gradient = load_some(g + i, n) * Exponent::power(d, task.beta);
      store(direct + at, gradient);
      store(u + at + task.after * rows.window_step, gradient * load_some(x + i, n) / d);
    }
  }
  zero_borders(rows, u, task.after, task.before);
  const Vec<Acc<T>> slope = broadcast(Acc<T>(-2) * task.factor * task.beta);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* const x = row_of(task.input, rows, image, first, r);
    T* const y = row_of(task.output, rows, image, first, r);
    for (int64_t i = 0; i < rows.length; i += L) {
      const int64_t at = r * rows.step + i, n = rows.length - i;
      const Vec<Acc<T>> sum = window_sum(u + at, rows.window_step, size);
      store_some(y + i, fma(slope * load_some(x + i, n), sum, load(direct + at)), n);
    }
  }
}

// f(image, first position, positions) for each task.
template <class T, class F>
FASTCV_INLINE void each_part(const LocalResponseNorm<T>& task, int64_t begin, int64_t end, const F& f) {
  const int64_t parts = local_response_norm_parts(task), positions = part_positions(task);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % parts * positions;
    f(t / parts, first, min_of(positions, task.input.width - first));
  }
}

}  // namespace

template <class T>
int64_t local_response_norm_parts(const LocalResponseNorm<T>& task) {
  const int64_t positions = part_positions(task);
  return (task.input.width + positions - 1) / positions;
}

template <class T>
int64_t local_response_norm_scratch(const LocalResponseNorm<T>& task) {
  return buffer_size(task) * (task.grad.data ? 3 : 1);
}

template <class T>
void local_response_norm(const LocalResponseNorm<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  with_exponent(task.beta, [&](auto exponent) {
    each_part(task, begin, end, [&](int64_t image, int64_t first, int64_t positions) {
      forward_part<decltype(exponent)>(task, image, first, positions, scratch);
    });
  });
}

template <class T>
void local_response_norm_backward(const LocalResponseNorm<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  with_exponent(task.beta, [&](auto exponent) {
    each_part(task, begin, end, [&](int64_t image, int64_t first, int64_t positions) {
      backward_part<decltype(exponent)>(task, image, first, positions, scratch);
    });
  });
}

#define FASTCV_INSTANTIATE(T)                                                                           \
  template int64_t local_response_norm_parts<T>(const LocalResponseNorm<T>&);                           \
  template int64_t local_response_norm_scratch<T>(const LocalResponseNorm<T>&);                         \
  template void local_response_norm<T>(const LocalResponseNorm<T>&, int64_t, int64_t, Acc<T>*);         \
  template void local_response_norm_backward<T>(const LocalResponseNorm<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
