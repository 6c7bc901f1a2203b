// The likelihoods' names, and their derivative in differentiable aten ops for second derivatives. Values and
// derivatives for the kernels stand in math/likelihood.h.
#pragma once

#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>

#include "common.h"

namespace fastvae {

inline Likelihood parse_likelihood(const char* op, c10::string_view name) {
  if (name == "mse") return Likelihood::mse;
  if (name == "gaussian") return Likelihood::gaussian;
  TORCH_CHECK_VALUE(false, op, ": likelihood must be \"mse\" or \"gaussian\", but got \"", name, "\"");
}

// The value, for a compiler (reconstruction_loss.cpp).
inline Tensor differentiable_value(Likelihood likelihood, const Tensor& recon_x, const Tensor& x) {
  const Tensor difference = widened(recon_x) - widened(x);
  const Tensor square = difference * difference;
  return likelihood == Likelihood::mse ? square : 0.5 * square;
}

// d(value) / d(recon_x); for these likelihoods d(value) / d(x) is its negative.
inline Tensor differentiable_d_recon_x(Likelihood likelihood, const Tensor& recon_x, const Tensor& x) {
  const Tensor difference = widened(recon_x) - widened(x);
  return likelihood == Likelihood::mse ? 2 * difference : difference;
}

}  // namespace fastvae
