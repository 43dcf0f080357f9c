// The loops of the gradient of resampling: the transpose of the forward pass, in gather form. An input row's gradient
// is a weighted sum of output rows, narrowed then to its columns; channels-last it is the sum of a pixel's outputs. So
// each number is summed by one thread in one order.
//
// Narrowing takes tap after tap of a vector of inputs: where the map grew no more than twice, a tap's outputs lie in
// two vectors, from which one permutation picks (AVX-512; elsewhere element by element).
//
// Bound by bytes: 64 channels of 256 x 256 to 128 x 128 in float32 read 17 MB and write 4 MB.
#include "interpolate_rows.h"

namespace fastcv::FASTCV_ISA {
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

#define FASTCV_INSTANTIATE(T)                                                      \
  template int64_t interpolate_backward_scratch<T>(const InterpolateBackward<T>&); \
  template void interpolate_backward<T>(const InterpolateBackward<T>&, int64_t, int64_t, Acc<T>*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)

}  // namespace fastcv::FASTCV_ISA
