// The loops of the gradient of resampling: the transpose of the forward pass, in gather form. An input row's gradient
// is a weighted sum of output rows, narrowed then to its columns; channels-last it is the sum of a pixel's outputs. So
// each number is summed by one thread in one order.
//
// Narrowing takes tap after tap of a vector of inputs: where the map grew no more than twice, a tap's outputs lie in
// two vectors, from which one permutation picks (AVX-512; elsewhere element by element). Where a map is doubled, all
// vectors but the outer ones pick alike, and what they pick and its weights stay in registers.
//
// Bound by bytes: 64 channels of 256 x 256 to 128 x 128 in float32 read 17 MB and write 4 MB.
#include "interpolate_rows.h"

namespace fastcv::FASTCV_ISA {
namespace {

// Bytes from what is read to what is fetched: the processor's own prefetching stops at the end of a page of 4 KB.
constexpr int64_t kAhead = 4096;

// to (+)= the weighted sum of N rows, of which the last two are read for the first time.
template <int N, class T>
void add_rows(const T* const (&rows)[4], const Acc<T> (&weights)[4], bool begins, int64_t length, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> w[N];
  for (int k = 0; k < N; ++k) w[k] = broadcast(weights[k]);
  int64_t i = 0;
  for (; i + L <= length; i += L) {
    for (int k = N < 2 ? 0 : N - 2; k < N; ++k)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[k] + i) + kAhead);
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
    for (int i = 0; i < n; ++i)
      rows[i] = plane + task.rows.from[k + i] * task.grad.stride_y, weights[i] = task.rows.weight[k + i];
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

// One vector of inputs from `x` on. Where there is no tap its weight is 0, and the output may be infinite.
FASTCV_INLINE Vec<float> narrowed(const TapTable<float>& table, const float* line, int64_t x) {
  Vec<float> sum{};
  for (int64_t t = 0; t < table.taps; ++t) {
    const int32_t* const from = table.from + t * table.stride + x;
    Vec<int32_t> index;
    memcpy(&index, from, sizeof index);
    const Vec<float> w = load(table.weight + t * table.stride + x);
    const Vec<float> with = fma(w, pick(line + from[0], index - from[0]), sum);
    sum = w != 0 ? with : sum;
  }
  return sum;
}

// Vectors of inputs from the second on whose taps are the second's, moved: most of them where a map is doubled.
struct Repeated {
  int64_t end;   // of the inputs in them; they begin at kLanes
  int64_t step;  // from the outputs of one to those of the next
};
Repeated repeated_taps(const TapTable<float>& table, int64_t width) {
  constexpr int64_t L = kLanes<float>;
  Repeated r{L, 0};
  if (width < 3 * L) return r;
  r.step = table.from[2 * L] - table.from[L];
  const auto is_repeated = [&](int64_t x) {
    for (int64_t t = 0; t < table.taps; ++t)
      for (int64_t i = 0; i < L; ++i) {
        const int64_t at = t * table.stride + x + i, first = t * table.stride + L + i;
        if (table.from[at] - table.from[first] != r.step * (x / L - 1)) return false;
        if (table.weight[at] == 0 || table.weight[at] != table.weight[first]) return false;
      }
    return true;
  };
  while (r.end + L <= width && is_repeated(r.end)) r.end += L;
  return r;
}

template <int Taps, class T>
void narrow_repeated(const TapTable<float>& table, const Repeated& repeated, const float* line, T* to) {
  constexpr int64_t L = kLanes<float>;
  Vec<int32_t> index[Taps];
  Vec<float> w[Taps];
  const float* from[Taps];
#pragma GCC unroll 8
  for (int t = 0; t < Taps; ++t) {
    const int32_t* const first = table.from + t * table.stride + L;
    memcpy(&index[t], first, sizeof index[t]);
    index[t] -= first[0];
    w[t] = load(table.weight + t * table.stride + L);
    from[t] = line + first[0];
  }
  for (int64_t x = L, at = 0; x < repeated.end; x += L, at += repeated.step) {
    Vec<float> sum{};
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) sum = fma(w[t], pick(from[t] + at, index[t]), sum);
    store(to + x, sum);
  }
}

template <class T>
void narrow_by_table(const InterpolateBackward<T>& task, const Repeated& repeated, const float* line, T* to) {
  constexpr int64_t L = kLanes<float>;
  const TapTable<float>& table = task.table;
  const int64_t width = task.output.width;
  store_some(to, narrowed(table, line, 0), width);
  switch (repeated.end > L ? table.taps : 0) {
    case 1: narrow_repeated<1>(table, repeated, line, to); break;
    case 2: narrow_repeated<2>(table, repeated, line, to); break;
    case 3: narrow_repeated<3>(table, repeated, line, to); break;
    case 4: narrow_repeated<4>(table, repeated, line, to); break;
    default:
      for (int64_t x = L; x < repeated.end; x += L) store(to + x, narrowed(table, line, x));
  }
  for (int64_t x = repeated.end; x < width; x += L) store_some(to + x, narrowed(table, line, x), width - x);
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

// Input rows [first, end). near: of the taps, where they are near.
template <class T>
void contiguous_rows(const InterpolateBackward<T>& task, const Repeated* near, const T* grad, int64_t first,
                     int64_t end, T* to, Acc<T>* lines) {
  const int64_t line = line_size(task.grad);
  for (int64_t y = first; y < end; ++y) sum_rows(task, grad, y, task.grad.width, lines + (y - first) * line);
  for (int64_t y = first; y < end; ++y) {
    const Acc<T>* const sums = lines + (y - first) * line;
    T* const row = to + y * task.output.stride_y;
    if constexpr (sizeof(Acc<T>) == 4) {
      if (near) {
        narrow_by_table(task, *near, sums, row);
        continue;
      }
    }
    narrow(task, sums, row);
  }
}

// NV vectors of an input pixel's channels, `last` of the last one's lanes: all its outputs, row by row.
template <int NV, class T>
FASTCV_INLINE void collect(const InterpolateBackward<T>& task, const T* plane, int64_t y, int64_t x, T* to,
                           int64_t last) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[NV] = {};
  for (int32_t k = task.rows.begin[y]; k < task.rows.begin[y + 1]; ++k)
    for (int32_t j = task.columns.begin[x]; j < task.columns.begin[x + 1]; ++j) {
      const T* const from = plane + task.rows.from[k] * task.grad.stride_y + task.columns.from[j] * task.grad.stride_x;
      const Vec<A> w = broadcast(task.rows.weight[k] * task.columns.weight[j]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[v] = fma(w, load_some(from + v * L, v + 1 < NV ? L : last), sum[v]);
    }
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) store_some(to + v * L, sum[v], v + 1 < NV ? L : last);
}

// As many channels at a time as there are registers for: runs of 1 KB are fetched ahead, those of 256 bytes are not.
template <class T>
void collect_pixels(const InterpolateBackward<T>& task, const T* plane, int64_t y, T* to) {
  constexpr int L = kLanes<Acc<T>>, kMost = kVectorBytes == 64 ? 16 : 8;
  const int64_t channels = task.output.channels;
  for (int64_t x = 0; x < task.output.width; ++x, to += task.output.stride_x) {
    int64_t c = 0;
    for (; c + kMost * L <= channels; c += kMost * L) collect<kMost>(task, plane + c, y, x, to + c, L);
    for (; c < channels; c += 4 * L) {
      const int64_t n = min_of(4 * L, channels - c);
      switch ((n + L - 1) / L) {
        case 4: collect<4>(task, plane + c, y, x, to + c, n - 3 * L); break;
        case 3: collect<3>(task, plane + c, y, x, to + c, n - 2 * L); break;
        case 2: collect<2>(task, plane + c, y, x, to + c, n - L); break;
        default: collect<1>(task, plane + c, y, x, to + c, n);
      }
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
  Repeated repeated{};
  const Repeated* near = nullptr;
  if constexpr (sizeof(Acc<T>) == 4) {
    if (!task.channels_last && taps_are_near(task)) {
      repeated = repeated_taps(task.table, task.output.width);
      near = &repeated;
    }
  }
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

#define FASTCV_INSTANTIATE(T)                                                      \
  template int64_t interpolate_backward_scratch<T>(const InterpolateBackward<T>&); \
  template void interpolate_backward<T>(const InterpolateBackward<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
