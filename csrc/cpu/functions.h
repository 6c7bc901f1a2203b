// For the tests: the functions of csrc/math alone, as the kernels of an instruction set compute them.
#pragma once

#include "../math/config.h"

namespace fastvae::cpu {

enum class Function : int {
  multiply_add,
  exponential,
  exponential_of_log_weight,
  expm1,
  expm1_minus,
  expm1_of_negative,
  logarithm,
  log1p,
  sine,
  cosine,
  delta,
  chi
};

// out[i] = function(x[0][i], x[1][i], x[2][i]), with as many arguments as `function` has; float, or double if float64.
using Functions = void (*)(Function, bool float64, const void* const* x, void* out, int64_t n);

// functions.cpp is compiled once for each of these.
extern const Functions functions_baseline, functions_avx2, functions_avx512;

}  // namespace fastvae::cpu
