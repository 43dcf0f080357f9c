// Which instruction set the CPU kernels run with.
//
// A file `<operator>_kernels.cpp` is compiled once per instruction set into the namespaces fastcv::baseline (SSE2 on
// x86-64, NEON on 64-bit Arm), fastcv::avx2 (AVX2, FMA, F16C) and fastcv::avx512 (F, BW, DQ, VL). The shell picks one
// at run time, in one visible line: FASTCV_PICK(nms_segment<float>)(...).
#pragma once

namespace fastcv {

enum class CpuIsa { baseline, avx2, avx512 };

// The best level that the processor has, capped by the environment variable FASTCV_CPU_ISA; read once.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);
bool cpu_isa_available(CpuIsa isa);
// Whether it has instructions for pairs of bfloat16 numbers (AVX512-BF16), which kernels are compiled for.
bool bf16_instructions();
// And multiplies them faster than float32: Zen 4 does, twice as fast; on a Xeon they take 1.6 times as long.
bool bf16_products();
// Whether it multiplies tiles of them (AMX), and the system lets this process do so: eight times as fast.
bool amx_products();

}  // namespace fastcv

// Declares a kernel in the namespace of every instruction set.
#if defined(FASTCV_X86)
#define FASTCV_EACH_ISA(...)            \
  namespace fastcv::baseline {          \
  __VA_ARGS__                           \
  }                                     \
  namespace fastcv::avx2 {              \
  __VA_ARGS__                           \
  }                                     \
  namespace fastcv::avx512 {            \
  __VA_ARGS__                           \
  }
#define FASTCV_PICK(...)                                                            \
  (::fastcv::cpu_isa() == ::fastcv::CpuIsa::avx512 ? &::fastcv::avx512::__VA_ARGS__ \
   : ::fastcv::cpu_isa() == ::fastcv::CpuIsa::avx2 ? &::fastcv::avx2::__VA_ARGS__   \
                                                   : &::fastcv::baseline::__VA_ARGS__)
#else
#define FASTCV_EACH_ISA(...)   \
  namespace fastcv::baseline { \
  __VA_ARGS__                  \
  }
#define FASTCV_PICK(...) (&::fastcv::baseline::__VA_ARGS__)
#endif
