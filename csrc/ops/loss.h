// A formula's values over some tensors, weighted and reduced: kl_normal and reconstruction_loss, and the terms of
// vae_loss.
#pragma once

#include "composed.h"

namespace fastvae {

using Numbers = std::optional<at::ArrayRef<double>>;

// `code` is the formula, the activation and the reduction in one integer, as fastvae/functional.py makes it; -1: none.
inline Loss loss_of(int64_t code, Numbers numbers = {}) {
  if (code < 0) return {};
  return {code, code / 32, code / 8 % 4, static_cast<Reduction>(code % 8),
          numbers.has_value() ? numbers->vec() : std::vector<double>()};
}
// The inputs, by their roles in the formula. `numbers`, if defined, stands for loss.numbers.
void check_loss(const char* op, const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers = {});

}  // namespace fastvae
