// The smallest operator, a template for new ones: fastcv::null(x) copies a tensor.
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/types.h"

FASTCV_EACH_ISA(
    // out[i] = x[i] for i in [0, n).
    template <class T> void null_forward(const T* x, T* out, int64_t n);)
