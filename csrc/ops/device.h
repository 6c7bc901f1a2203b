// Runs a kernel on the device that its tensors are on; on Meta, where there is nothing to run, not at all.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

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

// New noise on like's device and the int64 tensor (seed, offset) that remembers it. On the CPU: one 64-bit draw from
// the generator (or torch's default one) as the seed, offset 0. On CUDA: the generator's seed, and its offset, which
// moves on; a kernel that makes the noise fills the tensor in.
struct Draw {
  Tensor state;
  Noise noise;
};
Draw draw(const Tensor& like, const std::optional<at::Generator>& generator);
// The noise that a state remembers.
Noise remembered(const Tensor& state);

}  // namespace fastvae
