// For the tests: the functions of csrc/math alone, as the kernels of an instruction set compute them.
#pragma once

#include "../math/config.h"

namespace fastvae::cpu {

// out[i] = f(x[0][i], x[1][i], x[2][i]) for the function f of this name, with as many arguments as it has; float, or
// double if float64. False if there is none.
using Functions = bool (*)(const char* name, bool float64, const void* const* x, void* out, int64_t n);

// functions.cpp is compiled once for each of these.
extern const Functions functions_baseline, functions_avx2, functions_avx512;

}  // namespace fastvae::cpu
