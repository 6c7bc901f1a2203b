// A pass with tensors, as the ops describe it. prepare() makes kernels.h's PassArgs from it.
#pragma once

#include <array>
#include <vector>

#include "checks.h"
#include "device.h"
#include "reductions.h"

namespace fastvae {

template <size_t N>
using Wants = std::array<bool, N>;
using Inputs = std::array<Tensor, kMaxInputs>;

// The options of a loss.
struct Loss {
  int64_t code = -1;      // the next three in one (loss.h)
  int64_t formula = -1;   // its place in formulas/list.h; -1: none
  int64_t transform = 0;  // Activation or Scale
  Reduction reduction = Reduction::sum;
  // The constant added to each value, the scale of the data, the least value (free bits), the least and the highest
  // logvar, then the formula's own numbers. Empty if none has an effect.
  std::vector<double> numbers;
};
constexpr int kOwnNumbers = 5;  // where the formula's own begin

struct PassCall {
  Inputs in;  // in the formula's order; undefined where the formula has fewer
  Loss loss;
  Tensor weight;      // undefined: 1
  double factor = 1;  // the gradients are those of factor * factor_at * upstream * loss
  Tensor factor_at;   // beta, if it is a tensor; undefined: 1
  Tensor upstream;    // undefined: 1
  bool want_value = false;
  Wants<kMaxInputs> wants = {};  // gradients
  // The sample, if in is (mu, logvar, ...): forward (want_z) or backward (dz).
  bool want_z = false, want_d_eps = false;
  Tensor dz;
  Tensor eps;   // the noise, if the user gives it
  Noise noise;  // else the noise to draw
};

// A pass that is ready to run. On Meta it has only the results.
struct Pass {
  Tensor value, z, d_eps;
  Inputs d;
  PassArgs args;
  std::array<Tensor, 3> alive;  // what args points to besides inputs and results
};
Pass prepare(const PassCall& call);
Pass run(const PassCall& call);

}  // namespace fastvae
