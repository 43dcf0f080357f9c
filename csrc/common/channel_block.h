// Blocks of channels of a feature map in the layout that kernels like: [pixels][kLanes].
//
// A kernel that works on all channels of a pixel at once reads a channels-last map in place. Of a contiguous map it
// takes one block of kLanes channels at a time: pack() brings the block into scratch that stays in cache, unpack()
// brings results back. Both transpose squares of kLanes x kLanes in registers.
#pragma once

#include "feature_map.h"
#include "simd.h"

namespace fastcv::FASTCV_ISA {

template <int... J>
struct Indices {};
template <int N, int... J>
struct MakeIndices : MakeIndices<N - 1, N - 1, J...> {};
template <int... J>
struct MakeIndices<0, J...> {
  using type = Indices<J...>;
};

// Swaps the off-diagonal S x S quarters of the square that rows a and b (S apart) belong to.
template <int S, class V, int... J>
FASTCV_INLINE void swap_quarters(V& a, V& b, Indices<J...>) {
  constexpr int L = sizeof...(J);
  const V upper = __builtin_shufflevector(a, b, ((J & S) ? L + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? L + J : J + S)...);
  a = upper;
}

template <int S, class V, int L>
FASTCV_INLINE void transpose_stage(V (&rows)[L]) {
  for (int i = 0; i < L; ++i)
    if (!(i & S)) swap_quarters<S>(rows[i], rows[i + S], typename MakeIndices<L>::type{});
}

template <class V, int L>
FASTCV_INLINE void transpose(V (&rows)[L]) {
  if constexpr (L >= 16) transpose_stage<8>(rows);
  if constexpr (L >= 8) transpose_stage<4>(rows);
  if constexpr (L >= 4) transpose_stage<2>(rows);
  transpose_stage<1>(rows);
}

// block[i][c] = source[c * stride_c + i * stride] for i < n, c < channels <= kLanes; the other lanes are zero.
template <class T>
void pack(const T* source, int64_t stride_c, int64_t stride, int64_t n, int channels, accumulate_t<T>* block) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if (stride_c == 1) {
    for (; i < n; ++i)
      store(block + i * L, channels == L ? load(source + i * stride) : load_first(source + i * stride, channels));
  } else if (stride == 1) {
    for (; i + L <= n; i += L) {
      Vec<A> rows[L];
      for (int c = 0; c < L; ++c) rows[c] = c < channels ? load(source + c * stride_c + i) : Vec<A>{};
      transpose(rows);
      for (int j = 0; j < L; ++j) store(block + (i + j) * L, rows[j]);
    }
  }
  for (; i < n; ++i) {
    for (int c = 0; c < channels; ++c) block[i * L + c] = to_accumulate(source[c * stride_c + i * stride]);
    for (int c = channels; c < L; ++c) block[i * L + c] = 0;
  }
}

// The reverse: target[c * stride_c + i * stride] = block[i][c].
template <class T>
void unpack(const accumulate_t<T>* block, int64_t n, int channels, T* target, int64_t stride_c, int64_t stride) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if (stride_c == 1) {
    for (; i < n; ++i) {
      if (channels == L)
        store(target + i * stride, load(block + i * L));
      else
        store_first(target + i * stride, load(block + i * L), channels);
    }
  } else if (stride == 1) {
    for (; i + L <= n; i += L) {
      Vec<A> rows[L];
      for (int j = 0; j < L; ++j) rows[j] = load(block + (i + j) * L);
      transpose(rows);
      for (int c = 0; c < channels; ++c) store(target + c * stride_c + i, rows[c]);
    }
  }
  for (; i < n; ++i)
    for (int c = 0; c < channels; ++c) from_accumulate(block[i * L + c], target + c * stride_c + i * stride);
}

// A whole image's block of channels, and back.
template <class T>
void pack_image(const FeatureMap<const T>& map, int64_t image, int64_t channel, int channels, accumulate_t<T>* block) {
  for (int64_t y = 0; y < map.height; ++y)
    pack(map.data + image * map.stride_n + channel * map.stride_c + y * map.stride_y, map.stride_c, map.stride_x,
         map.width, channels, block + y * map.width * kLanes<accumulate_t<T>>);
}
template <class T>
void unpack_image(const accumulate_t<T>* block, const FeatureMap<T>& map, int64_t image, int64_t channel,
                  int channels) {
  for (int64_t y = 0; y < map.height; ++y)
    unpack(block + y * map.width * kLanes<accumulate_t<T>>, map.width, channels,
           map.data + image * map.stride_n + channel * map.stride_c + y * map.stride_y, map.stride_c, map.stride_x);
}

}  // namespace fastcv::FASTCV_ISA
