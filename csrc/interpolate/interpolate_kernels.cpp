// The loops of resampling, one axis after the other.
//
// Forward, contiguous: an input row is widened once, to scratch memory, and kept while output rows need it (two of them
// at a time); an output row is one of them, or a blend of two. Widening takes elements at low[o], vectors of them:
// where the map grows, a vector of outputs comes from no more than a vector of inputs, one load and one permutation.
// Channels-last there are vectors of channels, and rows are blended first, for the pixels on both sides of some
// outputs.
//
// Bound by bytes: 64 channels from 128 x 128 to 256 x 256 in float32 read 4 MB and write 17 MB.
#include "interpolate_rows.h"

namespace fastcv::FASTCV_ISA {
namespace {

// A small memcpy without its call.
template <class T>
FASTCV_INLINE void copy_elements(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kVectorBytes / int64_t(sizeof(T));
  int64_t c = 0;
  for (; c + L <= count; c += L) memcpy(to + c, from + c, kVectorBytes);
  if (c < count) memcpy(to + c, from + c, size_t(count - c) * sizeof(T));
}

// Lanes index[i] of x, for float with AVX2 and AVX-512.
template <class A>
constexpr bool kPermutes = sizeof(A) == 4 && kVectorBytes >= 32;
FASTCV_INLINE Vec<float> permute(Vec<float> x, [[maybe_unused]] Vec<int32_t> index) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  return x;
#endif
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Whether each vector of outputs comes from no more than a vector of inputs.
template <class A>
bool is_near(const ResampleAxis<A>& axis, bool zeros, int64_t count) {
  constexpr int L = kLanes<A>;
  bool near = kPermutes<A> && !zeros;
  for (int64_t o = 0; o < count && near; o += L) near = axis.low[o + L - 1] - axis.low[o] < L;
  return near;
}

// A vector of outputs from `o` on of a contiguous row, read where it lies: what a copy in scratch memory had just been
// given could not be read across two vectors before both had left the store buffer, behind outputs that wait for their
// lines.
template <bool Near, bool Blends, class T>
FASTCV_INLINE Vec<Acc<T>> widened(const ResampleAxis<Acc<T>>& axis, const T* row, int64_t width, int64_t o) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int32_t* const low = axis.low + o;
  Vec<A> x{}, next{};
  if constexpr (Near && kPermutes<A>) {
    Vec<int32_t> index;
    memcpy(&index, low, sizeof index);
    index -= low[0];
    const int64_t rest = width - low[0];
    if (rest > L) {
      x = permute(load(row + low[0]), index);
      if constexpr (Blends) next = permute(load(row + low[0] + 1), index);
    } else {  // the row ends in this vector: its last element stands for the one after it
      const Vec<A> all = load_first(row + low[0], int(rest));
      x = permute(all, index);
      if constexpr (Blends) next = permute(all, min(index + 1, Vec<int32_t>{} + int32_t(rest - 1)));
    }
  } else {
    for (int i = 0; i < L; ++i) {
      x[i] = low[i] < 0 ? A(0) : to_accumulate(row[low[i]]);
      if constexpr (Blends) next[i] = to_accumulate(row[min_of(low[i] + 1, width - 1)]);
    }
  }
  if constexpr (!Blends) return x;
  const Vec<A> w = load(axis.weight + o);
  return fma(w, next, (A(1) - w) * x);
}

// f(near, blends) as constants.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <class F>
FASTCV_INLINE void with_kind(bool near, bool blends, const F& f) {
  if (near)
    return blends ? f(Constant<1>{}, Constant<1>{}) : f(Constant<1>{}, Constant<0>{});
  blends ? f(Constant<0>{}, Constant<1>{}) : f(Constant<0>{}, Constant<0>{});
}

template <class T>
struct Lines {
  const Interpolate<T>& task;
  const T* plane;
  bool near;
  Acc<T>* lines[2];  // widened rows: those of even and of odd number
  int64_t held[2]{-1, -1};

  const T* row(int64_t y) const { return plane + y * task.input.stride_y; }

  const Acc<T>* line(int64_t y) {
    Acc<T>* const to = lines[y & 1];
    if (held[y & 1] == y) return to;
    held[y & 1] = y;
    with_kind(near, task.columns.weight != nullptr, [&](auto is_near, auto blends) {
      for (int64_t o = 0; o < task.output.width; o += kLanes<Acc<T>>)
        store(to + o, widened<decltype(is_near)::value, decltype(blends)::value>(task.columns, row(y), task.input.width, o));
    });
    return to;
  }
};

// Rows [first, end), all of one input row. One after the other: two that are written side by side take twice as long.
template <class T>
void same_rows(const Interpolate<T>& task, Lines<T>& lines, int64_t y, T* to, int64_t first, int64_t end) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t width = task.output.width, step = task.output.stride_y, whole = width / L * L;
  T* const made = to + first * step;
  with_kind(lines.near, task.columns.weight != nullptr, [&](auto is_near, auto blends) {
    const auto vector = [&](int64_t o) FASTCV_INLINE_LAMBDA {
      return widened<decltype(is_near)::value, decltype(blends)::value>(task.columns, lines.row(y), task.input.width, o);
    };
    for (int64_t o = 0; o < whole; o += L) store(made + o, vector(o));
    if (whole < width) store_first(made + whole, vector(whole), int(width - whole));
  });
  for (int64_t row = first + 1; row < end; ++row) copy_elements(made, width, to + row * step);
}

template <class T>
void blended_row(const Interpolate<T>& task, Lines<T>& lines, int64_t o, T* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t low = task.rows.low[o], width = task.output.width, whole = width / L * L;
  const A* const a = lines.line(low);
  const A* const b = lines.line(low + 1);
  const Vec<A> w = broadcast(task.rows.weight[o]), rest = A(1) - w;
  for (int64_t i = 0; i < whole; i += L) store(to + i, fma(w, load(b + i), rest * load(a + i)));
  if (whole < width) store_first(to + whole, fma(w, load(b + whole), rest * load(a + whole)), int(width - whole));
}

// Whether output row o is one input row.
template <class T>
FASTCV_INLINE bool is_single(const Interpolate<T>& task, int64_t o) {
  return !task.rows.weight || task.rows.low[o] + 1 >= task.input.height;
}
// The first row after `o` that is not of the same single input row.
template <class T>
FASTCV_INLINE int64_t end_of_run(const Interpolate<T>& task, int64_t o, int64_t last) {
  int64_t end = o + 1;
  while (end < last && task.rows.low[end] == task.rows.low[o]) ++end;
  return end;
}

// ---- forward, channels-last: vectors of a pixel's channels ----------------------------------------------------------

// Output rows [first, end) of one input row.
template <class T>
void same_pixels(const Interpolate<T>& task, const T* row, T* to, int64_t first, int64_t end) {
  const int64_t channels = task.input.channels, step = task.output.stride_x;
  for (int64_t r = first; r < end; ++r)
    for (int64_t o = 0; o < task.output.width; ++o) {
      const int64_t low = task.columns.low[o];
      T* const pixel = to + r * task.output.stride_y + o * step;
      if (low < 0)
        memset(pixel, 0, size_t(channels) * sizeof(T));
      else
        copy_elements(row + low * task.input.stride_x, channels, pixel);
    }
}

// An output row from one input row, or from two; columns are blended or not.
template <bool Two, bool Blends, class T>
void blended_pixels(const Interpolate<T>& task, const T* upper, const T* lower, Acc<T> weight, T* to) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int L = kLanes<A>;
  const int32_t* const low = task.columns.low;
  const int64_t channels = task.input.channels, step = task.output.stride_x, width = task.output.width;
  const V below = broadcast(weight), above = A(1) - below;
  const auto column = [&](int64_t at, int64_t n) FASTCV_INLINE_LAMBDA {
    const V x = load_some(upper + at, n);
    return Two ? fma(below, load_some(lower + at, n), above * x) : x;
  };
  for (int64_t o = 0, next; o < width; o = next) {
    for (next = o + 1; next < width && low[next] == low[o];) ++next;
    const int64_t left = low[o] * task.input.stride_x;
    const int64_t right = min_of(low[o] + 1, task.input.width - 1) * task.input.stride_x;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t n = channels - c;
      const V a = column(left + c, n);
      if (!Blends) {
        for (int64_t i = o; i < next; ++i) store_some(to + i * step + c, a, n);
        continue;
      }
      const V b = column(right + c, n);
      for (int64_t i = o; i < next; ++i) {
        const V w = broadcast(task.columns.weight[i]);
        store_some(to + i * step + c, fma(w, b, (A(1) - w) * a), n);
      }
    }
  }
}

template <class T>
void blended_pixels_of(const Interpolate<T>& task, const T* plane, int64_t o, T* to) {
  const T* const upper = plane + task.rows.low[o] * task.input.stride_y;
  if (is_single(task, o)) return blended_pixels<false, true>(task, upper, upper, Acc<T>(0), to);
  const T* const lower = upper + task.input.stride_y;
  if (task.columns.weight)
    blended_pixels<true, true>(task, upper, lower, task.rows.weight[o], to);
  else
    blended_pixels<true, false>(task, upper, lower, task.rows.weight[o], to);
}

// ---- forward, a task -------------------------------------------------------------------------------------------------

// Output rows [begin, end) of a plane.
template <class T>
void output_rows(const Interpolate<T>& task, Lines<T>& lines, T* to, int64_t begin, int64_t end) {
  const int64_t length = task.output.width * (task.channels_last ? task.output.channels : 1);
  for (int64_t o = begin, next; o < end; o = next) {
    next = o + 1;
    T* const row = to + o * task.output.stride_y;
    const int64_t low = task.rows.low[o];
    if (low < 0) {
      memset(row, 0, size_t(length) * sizeof(T));
    } else if (is_single(task, o) && !(task.channels_last && task.columns.weight)) {
      next = end_of_run(task, o, end);
      if (task.channels_last)
        same_pixels(task, lines.plane + low * task.input.stride_y, to, o, next);
      else
        same_rows(task, lines, low, to, o, next);
    } else if (task.channels_last) {
      blended_pixels_of(task, lines.plane, o, row);
    } else {
      blended_row(task, lines, o, row);
    }
  }
}

}  // namespace

template <class T>
int64_t interpolate_scratch(const Interpolate<T>& task) {
  return 2 * line_size(task.output);
}

template <class T>
void interpolate(const Interpolate<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t line = line_size(task.output), height = task.output.height;
  const bool near = !task.channels_last && is_near(task.columns, task.zeros, task.output.width);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / task.parts, part = t % task.parts;
    Lines<T> lines{task, plane_of(task.input, task.channels_last, plane), near, {scratch, scratch + line}};
    output_rows(task, lines, plane_of(task.output, task.channels_last, plane), part * height / task.parts,
                (part + 1) * height / task.parts);
  }
}

#define FASTCV_INSTANTIATE(T)                                      \
  template int64_t interpolate_scratch<T>(const Interpolate<T>&); \
  template void interpolate<T>(const Interpolate<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
