// The loops of resampling, one axis after the other.
//
// Forward, contiguous: an input row is widened once, to scratch memory, and kept while output rows need it (two of them at
// a time); an output row is one of them, or a blend of two. Widening takes elements at low[o], vectors of them: where the
// map grows, a vector of outputs comes from no more than a vector of inputs, one load and one permutation. Channels-last
// there are vectors of channels, and rows are blended first, for the pixels on both sides of some outputs.
//
// Backward is the transpose, in gather form: an input row's gradient is a weighted sum of output rows, narrowed then to its
// columns; channels-last it is the sum of a pixel's outputs. So each number is summed by one thread in one order.
//
// Bound by bytes: 64 channels from 128 x 128 to 256 x 256 in float32 read 4 MB and write 17 MB.
#include "interpolate.h"

#include "../common/simd.h"

namespace fastcv::FASTCV_ISA {
namespace {

template <class T>
using Acc = accumulate_t<T>;

FASTCV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
FASTCV_INLINE Vec<accumulate_t<S>> load_some(const S* p, int64_t n) {
  return n >= kLanes<accumulate_t<S>> ? load(p) : load_first(p, int(n));
}
template <class S>
FASTCV_INLINE void store_some(S* p, Vec<accumulate_t<S>> x, int64_t n) {
  if (n >= kLanes<accumulate_t<S>>)
    store(p, x);
  else
    store_first(p, x, int(n));
}

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

// A vector of outputs from `o` on of a contiguous row, read where it lies: what a copy in scratch memory had just been given
// could not be read across two vectors before both had left the store buffer, behind outputs that wait for their lines.
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

// A row, and room for two vectors after it.
template <class T>
int64_t line_size(const FeatureMap<T>& map) {
  return map.width + 2 * kLanes<float>;
}

// The offset of a plane: an image, or a channel of one.
template <class T>
T* plane_of(const FeatureMap<T>& map, bool channels_last, int64_t plane) {
  return channels_last ? map.data + plane * map.stride_n
                       : map.data + plane / map.channels * map.stride_n + plane % map.channels * map.stride_c;
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

// ---- backward --------------------------------------------------------------------------------------------------------

namespace {

// to (+)= the weighted sum of N rows.
template <int N, class T>
void add_rows(const T* const (&rows)[4], const Acc<T> (&weights)[4], bool begins, int64_t length, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> w[N];
  for (int k = 0; k < N; ++k) w[k] = broadcast(weights[k]);
  int64_t i = 0;
  for (; i + L <= length; i += L) {
    Vec<A> sum = begins ? Vec<A>{} : load(to + i);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum = fma(w[k], load(rows[k] + i), sum);
    store(to + i, sum);
  }
  if (i == length) return;
  Vec<A> sum = begins ? Vec<A>{} : load(to + i);
  for (int k = 0; k < N; ++k) sum = fma(w[k], load_first(rows[k] + i, int(length - i)), sum);
  store(to + i, sum);
}

// The weighted sum of the output rows that reach input row y.
template <class T>
void sum_rows(const InterpolateBackward<T>& task, const T* plane, int64_t y, int64_t length, Acc<T>* to) {
  const int32_t first = task.rows.begin[y], last = task.rows.begin[y + 1];
  if (first == last) memset(to, 0, size_t(length) * sizeof(Acc<T>));
  for (int32_t k = first; k < last; k += 4) {
    const T* rows[4] = {};
    Acc<T> weights[4] = {};
    const int n = int(min_of(4, last - k));
    for (int i = 0; i < n; ++i) rows[i] = plane + task.rows.from[k + i] * task.grad.stride_y, weights[i] = task.rows.weight[k + i];
    switch (n) {
      case 1: add_rows<1>(rows, weights, k == first, length, to); break;
      case 2: add_rows<2>(rows, weights, k == first, length, to); break;
      case 3: add_rows<3>(rows, weights, k == first, length, to); break;
      default: add_rows<4>(rows, weights, k == first, length, to);
    }
  }
}

// Lanes index[i] of two vectors that lie one after the other, with AVX-512.
FASTCV_INLINE Vec<float> pick(const float* from, [[maybe_unused]] Vec<int32_t> index) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_permutex2var_ps((__m512)load(from), (__m512i)index, (__m512)load(from + kLanes<float>));
#else
  return load(from);
#endif
}

// Whether a tap of a vector of inputs lies in two vectors of outputs.
template <class T>
bool taps_are_near(const InterpolateBackward<T>& task) {
  constexpr int L = kLanes<Acc<T>>;
  const TapTable<Acc<T>>& table = task.table;
  bool near = sizeof(Acc<T>) == 4 && kVectorBytes == 64 && table.from != nullptr;
  for (int64_t t = 0; near && t < table.taps; ++t)
    for (int64_t x = 0; x < task.output.width; x += L)
      near &= table.from[t * table.stride + x + L - 1] - table.from[t * table.stride + x] < 2 * L;
  return near;
}

template <class T>
void narrow_by_table(const InterpolateBackward<T>& task, const float* line, T* to) {
  constexpr int L = kLanes<float>;
  const TapTable<float>& table = task.table;
  const int64_t width = task.output.width;
  for (int64_t x = 0; x < width; x += L) {
    Vec<float> sum{};
    for (int64_t t = 0; t < table.taps; ++t) {
      const int32_t* const from = table.from + t * table.stride + x;
      Vec<int32_t> index;
      memcpy(&index, from, sizeof index);
      const Vec<float> w = load(table.weight + t * table.stride + x);
      const Vec<float> product = w * pick(line + from[0], index - from[0]);
      sum += w != 0 ? product : Vec<float>{};  // where there is no tap, the output may be infinite
    }
    store_some(to + x, sum, width - x);
  }
}

template <class T>
void narrow(const InterpolateBackward<T>& task, const Acc<T>* line, T* to) {
  const GatherAxis<Acc<T>>& axis = task.columns;
  for (int64_t x = 0; x < task.output.width; ++x) {
    Acc<T> sum = 0;
    for (int32_t k = axis.begin[x]; k < axis.begin[x + 1]; ++k) sum += axis.weight[k] * line[axis.from[k]];
    from_accumulate(sum, to + x);
  }
}

// Input rows [first, end).
template <class T>
void contiguous_rows(const InterpolateBackward<T>& task, bool near, const T* grad, int64_t first, int64_t end, T* to,
                     Acc<T>* lines) {
  const int64_t line = line_size(task.grad);
  for (int64_t y = first; y < end; ++y) sum_rows(task, grad, y, task.grad.width, lines + (y - first) * line);
  for (int64_t y = first; y < end; ++y) {
    const Acc<T>* const sums = lines + (y - first) * line;
    T* const row = to + y * task.output.stride_y;
    if constexpr (sizeof(Acc<T>) == 4) {
      if (near) {
        narrow_by_table(task, sums, row);
        continue;
      }
    }
    narrow(task, sums, row);
  }
}

// NV vectors of an input pixel's channels, `last` of the last one's lanes: all its outputs, row by row.
template <int NV, class T>
FASTCV_INLINE void collect(const InterpolateBackward<T>& task, const T* plane, int64_t y, int64_t x, T* to, int64_t last) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[NV] = {};
  for (int32_t k = task.rows.begin[y]; k < task.rows.begin[y + 1]; ++k)
    for (int32_t j = task.columns.begin[x]; j < task.columns.begin[x + 1]; ++j) {
      const T* const from = plane + task.rows.from[k] * task.grad.stride_y + task.columns.from[j] * task.grad.stride_x;
      const Vec<A> w = broadcast(task.rows.weight[k] * task.columns.weight[j]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v] = fma(w, load_some(from + v * L, v + 1 < NV ? L : last), sum[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store_some(to + v * L, sum[v], v + 1 < NV ? L : last);
}

template <class T>
void collect_pixels(const InterpolateBackward<T>& task, const T* plane, int64_t y, T* to) {
  constexpr int L = kLanes<Acc<T>>;
  const int64_t channels = task.output.channels;
  for (int64_t x = 0; x < task.output.width; ++x, to += task.output.stride_x)
    for (int64_t c = 0; c < channels; c += 4 * L) {
      const int64_t n = min_of(4 * L, channels - c);
      switch ((n + L - 1) / L) {
        case 4: collect<4>(task, plane + c, y, x, to + c, n - 3 * L); break;
        case 3: collect<3>(task, plane + c, y, x, to + c, n - 2 * L); break;
        case 2: collect<2>(task, plane + c, y, x, to + c, n - L); break;
        default: collect<1>(task, plane + c, y, x, to + c, n);
      }
    }
}

}  // namespace

// Rows that are summed before the first is narrowed: its vectors must have left the store buffer to be read across.
constexpr int64_t kRowsTogether = 8;

template <class T>
int64_t interpolate_backward_scratch(const InterpolateBackward<T>& task) {
  return kRowsTogether * line_size(task.grad);
}

template <class T>
void interpolate_backward(const InterpolateBackward<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t height = task.output.height;
  const bool near = !task.channels_last && taps_are_near(task);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / task.parts, part = t % task.parts;
    const T* const grad = plane_of(task.grad, task.channels_last, plane);
    T* const to = plane_of(task.output, task.channels_last, plane);
    const int64_t last = (part + 1) * height / task.parts;
    for (int64_t y = part * height / task.parts, next; y < last; y = next) {
      next = task.channels_last ? y + 1 : min_of(last, y + kRowsTogether);
      if (task.channels_last)
        collect_pixels(task, grad, y, to + y * task.output.stride_y);
      else
        contiguous_rows(task, near, grad, y, next, to, scratch);
    }
  }
}

#define FASTCV_INSTANTIATE(T)                                                                \
  template int64_t interpolate_scratch<T>(const Interpolate<T>&);                            \
  template void interpolate<T>(const Interpolate<T>&, int64_t, int64_t, Acc<T>*);            \
  template int64_t interpolate_backward_scratch<T>(const InterpolateBackward<T>&);           \
  template void interpolate_backward<T>(const InterpolateBackward<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
