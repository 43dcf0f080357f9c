// The processor's tiles (AMX): matrices of 16 rows of up to 64 bytes, and one instruction that multiplies two of them.
//
//     sums[m][n] += sum over k of a[m][k] * b[k][n]
//
// where sums are float32 and an element of a and b is a word of two bfloat16 numbers, multiplied one by one. Tiles 0 to
// 3 are sums, 16 by a vector; 4 and 5 are a, 16 by `words`; 6 and 7 are b, `words` by a vector. 16 x 16 x 16 words take
// 16 cycles: eight times the float32 multiply-adds of two units, if loads keep up, so that a tile should be multiplied
// twice for each time that it is loaded.
//
// Where the target has no such tiles, the same in vector code, so that what is built on them is tested everywhere.
#pragma once

#include "simd.h"

namespace fastcv::FASTCV_ISA {
namespace {  // files of one instruction set differ in whether they are compiled for tiles

constexpr int kTileWords = 16;            // at most
constexpr int kTileRows = kLanes<float>;  // 16, where it is not emulated

// sum + x * y for lanes of two bfloat16 numbers each.
FASTCV_INLINE Vec<float> add_pairs(Vec<float> x, Vec<float> y, Vec<float> sum) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  Vec<uint32_t> a, b;
  memcpy(&a, &x, sizeof a);
  memcpy(&b, &y, sizeof b);
  const Vec<uint32_t> parts[4] = {a << 16, b << 16, a & 0xffff0000u, b & 0xffff0000u};
  Vec<float> f[4];
  memcpy(f, parts, sizeof f);
  return fma(f[2], f[3], fma(f[0], f[1], sum));
#endif
}

#if defined(__AMX_BF16__)

// The thread's tiles, for a and b of so many words, as long as this lives. Strides are in words.
class Tiles {
 public:
  explicit Tiles(int64_t words) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? words * 4 : 64);
      config.rows[i] = uint8_t(i >= 6 ? words : kTileRows);
    }
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  FASTCV_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  FASTCV_INLINE void load(const float* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride * 4) : "memory");
  }
  template <int T>
  FASTCV_INLINE void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride * 4) : "memory");
  }
  template <int Sums, int A, int B>
  FASTCV_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(int64_t words) : words_(words) {}

  template <int T>
  void zero() {
    for (Vec<float>& row : rows_[T]) row = Vec<float>{};
  }
  template <int T>
  void load(const float* from, int64_t stride) {
    if constexpr (T == 4 || T == 5)
      for (int m = 0; m < kTileRows; ++m) memcpy(a_[T - 4][m], from + m * stride, size_t(words_) * sizeof(float));
    else
      for (int m = 0; m < (T > 5 ? int(words_) : kTileRows); ++m)
        rows_[T][m] = fastcv::FASTCV_ISA::load(from + m * stride);
  }
  template <int T>
  void store(float* to, int64_t stride) {
    for (int m = 0; m < kTileRows; ++m) fastcv::FASTCV_ISA::store(to + m * stride, rows_[T][m]);
  }
  template <int Sums, int A, int B>
  void multiply() {
    for (int m = 0; m < kTileRows; ++m)
      for (int k = 0; k < words_; ++k)
        rows_[Sums][m] = add_pairs(broadcast(a_[A - 4][m][k]), rows_[B][k], rows_[Sums][m]);
  }

 private:
  int64_t words_;
  Vec<float> rows_[8][kTileWords];
  float a_[2][kTileRows][kTileWords];
};

#endif

}  // namespace
}  // namespace fastcv::FASTCV_ISA
