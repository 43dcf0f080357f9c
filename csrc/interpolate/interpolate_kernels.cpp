// The loops of resampling, one axis after the other.
//
// Forward, contiguous: an input row is widened once, to scratch memory, and kept while output rows need it (two of them
// at a time); an output row is one of them, or a blend of two. Widening takes elements at low[o], vectors of them:
// where the map grows, a vector of outputs comes from no more than a vector of inputs, one load and one permutation.
// Channels-last there are vectors of channels, and rows are blended first, for the pixels on both sides of some
// outputs.
//
// Bound by bytes: 64 channels from 128 x 128 to 256 x 256 in float32 read 4 MB and write 17 MB, which a core of 26 GB/s
// does in 0.8 ms if it need not read what it writes: large outputs go past the caches (kInterpolateStreamBytes), in
// place where rows or pixels are whole lines, through a stage elsewhere.
#include "interpolate_rows.h"

namespace fastcv::FASTCV_ISA {
namespace {

// A small memcpy without its call.
template <class T>
FASTCV_INLINE void copy_elements(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kVectorBytes / int64_t(sizeof(T));
  if (count < L) {
    memcpy(to, from, size_t(count) * sizeof(T));
    return;
  }
  for (int64_t c = 0; c + L <= count; c += L) memcpy(to + c, from + c, kVectorBytes);
  memcpy(to + count - L, from + count - L, kVectorBytes);
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

// ---- forward --------------------------------------------------------------------------------------------------------

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
  void* staging;
  Acc<T>* lines[2];  // widened rows: those of even and of odd number
  int64_t held[2]{-1, -1};

  const T* row(int64_t y) const { return plane + y * task.input.stride_y; }

  const Acc<T>* line(int64_t y) {
    Acc<T>* const to = lines[y & 1];
    if (held[y & 1] == y) return to;
    held[y & 1] = y;
    with_kind(near, task.columns.weight != nullptr, [&](auto is_near, auto blends) {
      for (int64_t o = 0; o < task.output.width; o += kLanes<Acc<T>>)
        store(to + o,
              widened<decltype(is_near)::value, decltype(blends)::value>(task.columns, row(y), task.input.width, o));
    });
    return to;
  }
};

// f(vector of outputs, its first, lanes of it), in order.
template <class A, class F>
FASTCV_INLINE void each_vector(int64_t width, const F& f) {
  constexpr int L = kLanes<A>;
  const int64_t whole = width / L * L;
  for (int64_t o = 0; o < whole; o += L) f(o, int64_t(L));
  if (whole < width) f(whole, width - whole);
}

// Rows [first, end), all of one input row. One after the other: two that are written side by side take twice as long.
template <class T>
void same_rows(const Interpolate<T>& task, Lines<T>& lines, int64_t y, T* to, int64_t first, int64_t end) {
  const int64_t width = task.output.width, step = task.output.stride_y;
  T* const made = to + first * step;
  with_kind(lines.near, task.columns.weight != nullptr, [&](auto is_near, auto blends) {
    each_vector<Acc<T>>(width, [&](int64_t o, int64_t n) FASTCV_INLINE_LAMBDA {
      store_some(made + o, widened<decltype(is_near)::value, decltype(blends)::value>(task.columns, lines.row(y),
                                                                                     task.input.width, o), n);
    });
  });
  for (int64_t row = first + 1; row < end; ++row) copy_elements(made, width, to + row * step);
}

template <class T>
void blended_row(const Interpolate<T>& task, Lines<T>& lines, int64_t o, T* to) {
  using A = Acc<T>;
  const int64_t low = task.rows.low[o];
  const A* const a = lines.line(low);
  const A* const b = lines.line(low + 1);
  const Vec<A> w = broadcast(task.rows.weight[o]), rest = A(1) - w;
  each_vector<A>(task.output.width, [&](int64_t i, int64_t n) FASTCV_INLINE_LAMBDA {
    store_some(to + i, fma(w, load(b + i), rest * load(a + i)), n);
  });
}

// The first row after `o` that is not of the same single input row.
template <class T>
FASTCV_INLINE int64_t end_of_run(const Interpolate<T>& task, int64_t o, int64_t last) {
  int64_t end = o + 1;
  while (end < last && task.rows.low[end] == task.rows.low[o]) ++end;
  return end;
}

// Whether output row o is one input row.
template <class T>
FASTCV_INLINE bool is_single(const Interpolate<T>& task, int64_t o) {
  return !task.rows.weight || task.rows.low[o] + 1 >= task.input.height;
}

// Whether pieces of the output, of so many elements, are whole lines and vectors.
template <class T>
bool has_whole_lines(const Interpolate<T>& task, int64_t elements) {
  const uintptr_t bytes = uintptr_t(elements) * sizeof(T);
  return sizeof(T) == sizeof(Acc<T>) && ((uintptr_t(task.output.data) | bytes) & 63) == 0;
}

// A vector past the caches, or as usual.
template <class T>
FASTCV_INLINE void put(T* to, Vec<Acc<T>> x, int64_t n, [[maybe_unused]] bool stream) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    if (stream) return store_streaming(to, x);
  }
  store_some(to, x, n);
}

// Rows [begin, end) of a plane past the caches.
template <class T>
void streamed_rows(const Interpolate<T>& task, Lines<T>& lines, T* to, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t width = task.output.width, step = task.output.stride_y;
  const bool direct = has_whole_lines(task, width);
  Stage<T> stage(to + begin * step, lines.staging);
  for (int64_t o = begin; o < end; ++o) {
    T* const row = direct ? to + o * step : stage.next();
    const int64_t low = task.rows.low[o];
    if (low < 0) {
      memset(row, 0, size_t(width) * sizeof(T));
    } else {
      const A* const a = lines.line(low);
      const A* const b = is_single(task, o) ? a : lines.line(low + 1);
      if (a == b) {
        each_vector<A>(width, [&](int64_t i, int64_t n) FASTCV_INLINE_LAMBDA { put(row + i, load(a + i), n, direct); });
      } else {
        const Vec<A> w = broadcast(task.rows.weight[o]), rest = A(1) - w;
        each_vector<A>(width, [&](int64_t i, int64_t n) FASTCV_INLINE_LAMBDA {
          put(row + i, fma(w, load(b + i), rest * load(a + i)), n, direct);
        });
      }
    }
    if (!direct) stage.add(width);
  }
  if (!direct) stage.finish();
}

// ---- forward, channels-last: vectors of a pixel's channels ----------------------------------------------------------

// f(pixel of the input or null, pixel of the output) for output row r.
template <class T, class F>
FASTCV_INLINE void each_pixel(const Interpolate<T>& task, const T* row, T* to, const F& f) {
  for (int64_t o = 0; o < task.output.width; ++o, to += task.output.stride_x) {
    const int64_t low = task.columns.low[o];
    f(low < 0 ? nullptr : row + low * task.input.stride_x, to);
  }
}

template <class T>
FASTCV_INLINE void copy_pixel(const T* from, int64_t channels, T* to) {
  if (from)
    copy_elements(from, channels, to);
  else
    memset(to, 0, size_t(channels) * sizeof(T));
}

// Output rows [first, end) of one input row.
template <class T>
void same_pixels(const Interpolate<T>& task, const T* row, T* to, int64_t first, int64_t end, void* staging) {
  const int64_t channels = task.input.channels, step = task.output.stride_y;
  if (!task.stream) {
    for (int64_t r = first; r < end; ++r)
      each_pixel(task, row, to + r * step,
                 [&](const T* from, T* pixel) FASTCV_INLINE_LAMBDA { copy_pixel(from, channels, pixel); });
  } else if (has_whole_lines(task, channels) && !task.zeros) {
    for (int64_t r = first; r < end; ++r)
      each_pixel(task, row, to + r * step, [&](const T* from, T* pixel) FASTCV_INLINE_LAMBDA {
        stream_copy(pixel, from, channels * int64_t(sizeof(T)));
      });
  } else {
    Stage<T> stage(to + first * step, staging);
    for (int64_t r = first; r < end; ++r)
      each_pixel(task, row, to, [&](const T* from, T*) FASTCV_INLINE_LAMBDA {
        copy_pixel(from, channels, stage.next());
        stage.add(channels);
      });
    stage.finish();
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
  const bool stream = task.stream && has_whole_lines(task, channels);
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
        for (int64_t i = o; i < next; ++i) put(to + i * step + c, a, n, stream);
        continue;
      }
      const V b = column(right + c, n);
      for (int64_t i = o; i < next; ++i) {
        const V w = broadcast(task.columns.weight[i]);
        put(to + i * step + c, fma(w, b, (A(1) - w) * a), n, stream);
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

// ---- forward, a task ------------------------------------------------------------------------------------------------

// Output rows [begin, end) of a plane.
template <class T>
void output_rows(const Interpolate<T>& task, Lines<T>& lines, T* to, int64_t begin, int64_t end) {
  if (task.stream && !task.channels_last) return streamed_rows(task, lines, to, begin, end);
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
        same_pixels(task, lines.plane + low * task.input.stride_y, to, o, next, lines.staging);
      else
        same_rows(task, lines, low, to, o, next);
    } else if (task.channels_last) {
      blended_pixels_of(task, lines.plane, o, row);
    } else {
      blended_row(task, lines, o, row);
    }
  }
}

// Elements of scratch memory for a stage: whole lines.
template <class T>
int64_t stage_size(const Interpolate<T>& task) {
  if (!task.stream) return 0;
  const int64_t piece = task.channels_last ? task.output.channels : task.output.width;
  const int64_t bytes = Stage<T>::size(piece) * int64_t(sizeof(T));
  return (bytes + 63) / 64 * 64 / int64_t(sizeof(Acc<T>));
}

}  // namespace

template <class T>
int64_t interpolate_scratch(const Interpolate<T>& task) {
  return stage_size(task) + 2 * line_size(task.output);
}

template <class T>
void interpolate(const Interpolate<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t line = line_size(task.output), height = task.output.height;
  Acc<T>* const lines_at = scratch + stage_size(task);
  const bool near = !task.channels_last && is_near(task.columns, task.zeros, task.output.width);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / task.parts, part = t % task.parts;
    Lines<T> lines{task, plane_of(task.input, task.channels_last, plane), near, scratch,
                   {lines_at, lines_at + line}};
    output_rows(task, lines, plane_of(task.output, task.channels_last, plane), part * height / task.parts,
                (part + 1) * height / task.parts);
  }
  if (task.stream) stream_end();
}

#define FASTCV_INSTANTIATE(T)                                      \
  template int64_t interpolate_scratch<T>(const Interpolate<T>&); \
  template void interpolate<T>(const Interpolate<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
