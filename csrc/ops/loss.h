// A formula's values over some tensors, weighted and reduced: kl_normal and reconstruction_loss, and the terms of
// vae_loss.
#pragma once

#include "composed.h"

namespace fastvae {

using Numbers = std::optional<at::ArrayRef<double>>;

// `code` is the reduction (3 bits), the transform (2), the formula (5) and the dimensions beside the first that
// "sample" keeps, in one integer, as fastvae/functional.py makes it. Without a formula it is -1 - the transform.
inline Loss loss_of(int64_t code, Numbers numbers = {}) {
  const auto given = numbers.has_value() ? numbers->vec() : std::vector<double>();
  if (code < 0) return {code, -1, -1 - code, Reduction::sum, given};
  return {code, code / 32 % 32, code / 8 % 4, static_cast<Reduction>(code % 8 + code / 1024 * 8), given};
}
// `own` is how many numbers the formula has; without any the list may be empty.
void check_numbers(const char* op, const Loss& loss, int64_t own, const Tensor& numbers = {});
// The inputs, by their roles in the formula. `numbers`, if defined, stands for loss.numbers.
void check_loss(const char* op, const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers = {});

}  // namespace fastvae
