// Maxima and their positions in registers, shared by pooling, RoI pooling and programs.
#pragma once

#include "simd.h"

namespace fastcv::FASTCV_ISA {

template <class T>
using Acc = accumulate_t<T>;

template <class T>
using Position = SameSize<Acc<T>>;

// Where a value takes the place of the greatest so far: it is greater, or NaN.
template <class V>
FASTCV_INLINE auto takes_over(V value, V greatest) {
  return (value > greatest) | (value != value);
}

// value where it takes over, else `greatest`. Of x86's maximum, which gives the second operand where either is NaN, and
// a selection: then the next value waits for two instructions, not for a comparison, an "or" and a selection, which is
// what compilers make of takes_over and take 10 cycles (3x3 over 480x14x14 spent its time there).
template <class V>
FASTCV_INLINE V greater_of(V value, V greatest) {
#if defined(__AVX512F__)
  if constexpr (sizeof(value[0]) == 4) {
    const __m512 v = (__m512)value;
    return (V)_mm512_mask_mov_ps(_mm512_max_ps(v, (__m512)greatest), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
  } else {
    const __m512d v = (__m512d)value;
    return (V)_mm512_mask_mov_pd(_mm512_max_pd(v, (__m512d)greatest), _mm512_cmp_pd_mask(v, v, _CMP_UNORD_Q), v);
  }
#else
  return takes_over(value, greatest) ? value : greatest;
#endif
}

// The same with where it was found.
template <class V, class P>
FASTCV_INLINE void take_greater(V value, P here, V& greatest, P& where) {
  const auto better = takes_over(value, greatest);
  greatest = better ? value : greatest;
  where = better ? here : where;
}

}  // namespace fastcv::FASTCV_ISA
