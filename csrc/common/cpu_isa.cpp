#include "cpu_isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(FASTCV_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcv {

const char* cpu_isa_name(CpuIsa isa) {
  return isa == CpuIsa::avx512 ? "avx512" : isa == CpuIsa::avx2 ? "avx2" : "baseline";
}

bool cpu_isa_available(CpuIsa isa) {
#if defined(FASTCV_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == CpuIsa::avx512 ? avx512 : isa == CpuIsa::avx2 ? avx2 : true;
#else
  return isa == CpuIsa::baseline;
#endif
}

static CpuIsa choose() {
  CpuIsa best = cpu_isa_available(CpuIsa::avx512) ? CpuIsa::avx512
                : cpu_isa_available(CpuIsa::avx2) ? CpuIsa::avx2
                                                  : CpuIsa::baseline;
  const char* cap = std::getenv("FASTCV_CPU_ISA");
  if (!cap || !*cap) return best;
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512})
    if (!std::strcmp(cap, cpu_isa_name(isa))) return isa < best ? isa : best;
  std::fprintf(stderr, "fastcv: FASTCV_CPU_ISA=%s is ignored: expected baseline, avx2 or avx512\n", cap);
  return best;
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

bool bf16_instructions() {
#if defined(FASTCV_X86)
  return cpu_isa() == CpuIsa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool bf16_products() {
#if defined(FASTCV_X86)
  return bf16_instructions() && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool amx_products() {
#if defined(FASTCV_X86) && defined(__linux__)
  static const bool allowed = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;      // not every compiler knows them by name
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; a feature of xsave
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return bf16_instructions() && allowed;
#else
  return false;
#endif
}

}  // namespace fastcv
