// Runs a kernel on the device of its tensors. For Meta tensors nothing runs.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "../multivariate/multivariate.h"
#include "../pairwise/pairwise.h"

namespace fastvae {

using at::Tensor;

// `on` is any of the tensors.
void run_pass(const Tensor& on, const PassArgs&);
void run_objective(const Tensor& on, const PassArgs& recon, const PassArgs& kl, const Combination&);
void run_normal(const Tensor& on, const NormalArgs&, int64_t numel);
void run_scale(const Tensor& on, const ScaleArgs&);
void run_logistic_mixture(const Tensor& on, const MixtureArgs&);
void run_pairwise(const Tensor& on, const PairwiseArgs&, bool backward);
void run_multivariate(const Tensor& on, const MultivariateArgs&, bool backward);

// New noise on like's device, and its state: the int64 tensor (seed, offset). On the CPU the seed is one 64-bit draw
// from the generator (or torch's default generator), and the offset is 0. On CUDA both are the generator's, which then
// advances its offset; the kernel that draws the noise writes the state.
struct Draw {
  Tensor state;
  Noise noise;
};
Draw draw(const Tensor& like, const std::optional<at::Generator>& generator);
// The noise of a state.
Noise remembered(const Tensor& state);

}  // namespace fastvae
