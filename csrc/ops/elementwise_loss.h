// A formula's values over some tensors, weighted and reduced: kl_normal and reconstruction_loss, and the terms of
// vae_loss.
#pragma once

#include "composed.h"

namespace fastvae {

inline Loss loss_of(int64_t formula, std::optional<at::ArrayRef<double>> numbers, int64_t activation,
                    int64_t reduction) {
  return {formula, static_cast<Reduction>(reduction), activation,
          numbers.has_value() ? numbers->vec() : std::vector<double>()};
}
// What a formula is called in messages and in fastvae/likelihoods.py.
const char* formula_name(int64_t formula);
// The inputs, by their roles in the formula. `numbers`, if defined, stands for loss.numbers.
void check_loss(const char* op, const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers = {});

}  // namespace fastvae
