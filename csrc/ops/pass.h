// A pass as the ops ask for it, with tensors: what kernels.h's PassArgs is made from.
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

// What decides a loss beside its tensors.
struct Loss {
  int64_t code = -1;      // the next three in one (loss.h)
  int64_t formula = -1;   // its place in formulas/list.h; -1: none
  int64_t transform = 0;  // Activation or Scale
  Reduction reduction = Reduction::sum;
  // The constant added to each value, the scale of the data, the least value (free bits), the least and the highest
  // logvar, then the formula's own numbers; empty where all are the identity.
  std::vector<double> numbers;
};
constexpr int kOwnNumbers = 5;  // where the formula's own begin

struct PassCall {
  Inputs in;  // in the formula's order; undefined where the formula has fewer
  Loss loss;
  Tensor weight;      // undefined: 1
  double factor = 1;  // the gradients are those of factor ...
  Tensor factor_at;   // ... times this, if defined (beta), ...
  Tensor upstream;    // ... times this, if defined, times the loss
  bool want_value = false;
  Wants<kMaxInputs> wants = {};  // gradients
  // The sample, if in is (mu, logvar, ...): forward (want_z) or backward (dz).
  bool want_z = false, want_d_eps = false;
  Tensor dz;
  Tensor eps;   // given noise, or
  Noise noise;  // the noise to make
};

// A pass that is ready to run; on Meta, its results alone.
struct Pass {
  Tensor value, z, d_eps;
  Inputs d;
  PassArgs args;
  std::array<Tensor, 3> alive;  // what args points to beside the inputs
};
Pass prepare(const PassCall& call);
Pass run(const PassCall& call);

}  // namespace fastvae
