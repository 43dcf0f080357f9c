// The loops of resampling, one axis after the other.
//
// Forward: an input row is widened once, to scratch memory, and kept while output rows need it (two of them at a time); an
// output row is one of them, or a blend of two, vectors of a whole row. Backward is the transpose, in gather form: an input
// row's gradient is a weighted sum of output rows, narrowed then to its columns. So each number is summed by one thread in
// one order.
//
// Widening a contiguous row takes elements at low[o], vectors of them: where the map grows, a vector of outputs comes from
// no more than a vector of inputs, one load and one permutation. Channels-last it is vectors over channels.
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

// One contiguous row, `source` with its last element once more and room for a vector after it.
template <class A>
void widen(const ResampleAxis<A>& axis, bool zeros, const A* source, int64_t count, A* to) {
  constexpr int L = kLanes<A>;
  for (int64_t o = 0; o < count; o += L) {
    const int32_t* const low = axis.low + o;
    if constexpr (kPermutes<A>) {
      if (!zeros && low[L - 1] - low[0] < L) {
        Vec<int32_t> index;
        memcpy(&index, low, sizeof index);
        index -= low[0];
        Vec<A> x = permute(load(source + low[0]), index);
        if (axis.weight) {
          const Vec<A> w = load(axis.weight + o);
          x = fma(w, permute(load(source + low[0] + 1), index), (A(1) - w) * x);
        }
        store(to + o, x);
        continue;
      }
    }
    for (int i = 0; i < L; ++i) {
      const A* const from = source + low[i];
      const A w = axis.weight ? axis.weight[o + i] : A(0);
      to[o + i] = low[i] < 0 ? A(0) : axis.weight ? (A(1) - w) * from[0] + w * from[1] : from[0];
    }
  }
}

// One row of pixels with channels side by side.
template <class T>
void widen_pixels(const Interpolate<T>& task, const T* row, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = task.input.channels, last = task.input.width - 1;
  for (int64_t o = 0; o < task.output.width; ++o, to += channels) {
    const int64_t low = task.columns.low[o];
    if (low < 0) {
      memset(to, 0, size_t(channels) * sizeof(A));
      continue;
    }
    const T* const x = row + low * task.input.stride_x;
    if (!task.columns.weight) {
      for (int64_t c = 0; c < channels; c += L) store_some(to + c, load_some(x + c, channels - c), channels - c);
      continue;
    }
    const T* const y = row + min_of(low + 1, last) * task.input.stride_x;
    const Vec<A> w = broadcast(task.columns.weight[o]), rest = A(1) - w;
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t n = channels - c;
      store_some(to + c, fma(w, load_some(y + c, n), rest * load_some(x + c, n)), n);
    }
  }
}

template <class T>
struct Lines {
  const Interpolate<T>& task;
  const T* plane;
  Acc<T>* source;    // a contiguous row as it is read
  Acc<T>* lines[2];  // widened rows: those of even and of odd number
  int64_t held[2]{-1, -1};

  const Acc<T>* line(int64_t y) {
    Acc<T>* const to = lines[y & 1];
    if (held[y & 1] == y) return to;
    held[y & 1] = y;
    const T* const row = plane + y * task.input.stride_y;
    if (task.channels_last) {
      widen_pixels(task, row, to);
      return to;
    }
    constexpr int L = kLanes<Acc<T>>;
    const int64_t width = task.input.width;
    for (int64_t x = 0; x < width; x += L) store(source + x, load_some(row + x, width - x));
    source[width] = source[width - 1];
    widen(task.columns, task.zeros, source, task.output.width, to);
    return to;
  }
};

template <class T>
void output_row(const Interpolate<T>& task, Lines<T>& lines, int64_t o, T* to, int64_t length) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t low = task.rows.low[o];
  if (low < 0) {
    memset(to, 0, size_t(length) * sizeof(T));
    return;
  }
  const A* const a = lines.line(low);
  if (!task.rows.weight || low + 1 >= task.input.height) {
    for (int64_t i = 0; i < length; i += L) store_some(to + i, load(a + i), length - i);
    return;
  }
  const A* const b = lines.line(low + 1);
  const Vec<A> w = broadcast(task.rows.weight[o]), rest = A(1) - w;
  for (int64_t i = 0; i < length; i += L) store_some(to + i, fma(w, load(b + i), rest * load(a + i)), length - i);
}

template <class T>
int64_t line_size(const FeatureMap<T>& map, bool channels_last) {
  return map.width * (channels_last ? map.channels : 1) + 2 * kLanes<float>;
}

// The offset of a plane: an image, or a channel of one.
template <class T>
T* plane_of(const FeatureMap<T>& map, bool channels_last, int64_t plane) {
  return channels_last ? map.data + plane * map.stride_n
                       : map.data + plane / map.channels * map.stride_n + plane % map.channels * map.stride_c;
}

}  // namespace

template <class T>
int64_t interpolate_scratch(const Interpolate<T>& task) {
  return task.input.width + 3 * kLanes<Acc<T>> + 2 * line_size(task.output, task.channels_last);
}

template <class T>
void interpolate(const Interpolate<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t line = line_size(task.output, task.channels_last), height = task.output.height;
  const int64_t length = task.output.width * (task.channels_last ? task.output.channels : 1);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / task.parts, part = t % task.parts;
    Lines<T> lines{task, plane_of(task.input, task.channels_last, plane), scratch + 2 * line, {scratch, scratch + line}};
    T* const to = plane_of(task.output, task.channels_last, plane);
    for (int64_t o = part * height / task.parts; o < (part + 1) * height / task.parts; ++o)
      output_row(task, lines, o, to + o * task.output.stride_y, length);
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

namespace {

// The weighted sum of the output rows that reach input row y.
template <class T>
void sum_rows(const InterpolateBackward<T>& task, const T* plane, int64_t y, int64_t length, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int32_t first = task.rows.begin[y], last = task.rows.begin[y + 1];
  for (int64_t i = 0; i < length; i += L) {
    Vec<A> sum{};
    for (int32_t k = first; k < last; ++k)
      sum = fma(broadcast(task.rows.weight[k]), load_some(plane + task.rows.from[k] * task.grad.stride_y + i, length - i),
                sum);
    store(to + i, sum);
  }
}

template <class T>
void narrow(const InterpolateBackward<T>& task, const Acc<T>* line, T* to) {
  using A = Acc<T>;
  const GatherAxis<A>& axis = task.columns;
  for (int64_t x = 0; x < task.output.width; ++x) {
    A sum = 0;
    for (int32_t k = axis.begin[x]; k < axis.begin[x + 1]; ++k) sum += axis.weight[k] * line[axis.from[k]];
    from_accumulate(sum, to + x);
  }
}

template <class T>
void narrow_pixels(const InterpolateBackward<T>& task, const Acc<T>* line, T* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const GatherAxis<A>& axis = task.columns;
  const int64_t channels = task.output.channels;
  for (int64_t x = 0; x < task.output.width; ++x, to += task.output.stride_x)
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> sum{};
      for (int32_t k = axis.begin[x]; k < axis.begin[x + 1]; ++k)
        sum = fma(broadcast(axis.weight[k]), load(line + axis.from[k] * channels + c), sum);
      store_some(to + c, sum, channels - c);
    }
}

}  // namespace

template <class T>
int64_t interpolate_backward_scratch(const InterpolateBackward<T>& task) {
  return line_size(task.grad, task.channels_last);
}

template <class T>
void interpolate_backward(const InterpolateBackward<T>& task, int64_t begin, int64_t end, Acc<T>* scratch) {
  const int64_t height = task.output.height;
  const int64_t length = task.grad.width * (task.channels_last ? task.grad.channels : 1);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t plane = t / task.parts, part = t % task.parts;
    const T* const grad = plane_of(task.grad, task.channels_last, plane);
    T* const to = plane_of(task.output, task.channels_last, plane);
    for (int64_t y = part * height / task.parts; y < (part + 1) * height / task.parts; ++y) {
      sum_rows(task, grad, y, length, scratch);
      if (task.channels_last)
        narrow_pixels(task, scratch, to + y * task.output.stride_y);
      else
        narrow(task, scratch, to + y * task.output.stride_y);
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
