// Host functions that are not tensor operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../common/cpu_isa.h"

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (fastcv::CpuIsa isa : {fastcv::CpuIsa::baseline, fastcv::CpuIsa::avx2, fastcv::CpuIsa::avx512})
    if (fastcv::cpu_isa_available(isa)) names.push_back(fastcv::cpu_isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "fastcv's host functions: build and processor information.";
  m.def("cpu_isa", [] { return std::string(fastcv::cpu_isa_name(fastcv::cpu_isa())); },
        "The instruction set that the CPU kernels run with.");
  m.def("available_isas", &available_isas, "The instruction sets that this processor has, lowest first.");
  m.def("bfloat16_products", [] {
    return std::string(fastcv::amx_products() ? "amx" : fastcv::bf16_products() ? "avx512_bf16" : "none");
  }, "What the CPU kernels multiply bfloat16 numbers with: amx, avx512_bf16 or none.");
  m.def("compiler", [] { return std::string("C++ ") + __VERSION__; }, "The compiler that built this module.");
}
