// The loss of one formula, weighted and reduced: kl_normal, reconstruction_loss and the terms of vae_loss.
#pragma once

#include "composed.h"

namespace fastvae {

using Numbers = std::optional<at::ArrayRef<double>>;

// `code` is one integer that fastvae/functional.py makes: the reduction (3 bits), the transform (2), the formula (5),
// and how many dimensions "sample" keeps besides the first. Without a formula it is -1 - the transform.
inline Loss loss_of(int64_t code, Numbers numbers = {}) {
  const auto given = numbers.has_value() ? numbers->vec() : std::vector<double>();
  if (code < 0) return {code, -1, -1 - code, Reduction::sum, given};
  return {code, code / 32 % 32, code / 8 % 4, static_cast<Reduction>(code % 8 + code / 1024 * 8), given};
}
// `own`: how many numbers of its own the formula has. If it has none, the list may be empty.
void check_numbers(const char* op, const Loss& loss, int64_t own, const Tensor& numbers = {});
// Checks the inputs by their roles in the formula. `numbers`, if defined, replaces loss.numbers.
void check_loss(const char* op, const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers = {});

}  // namespace fastvae
