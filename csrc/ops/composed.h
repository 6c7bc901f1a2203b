// The formulas in aten ops: for compilers, which fuse them with what stands beside them, for second derivatives and for
// forward mode.
#pragma once

#include "autograd.h"

namespace fastvae {

// The loss. `numbers`, if defined, stands for loss.numbers: a compiler takes a tensor as an input, not as a constant.
Tensor composed_loss(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers);
// Its gradients, given that of the loss; differentiable.
variable_list composed_gradients(const Tensor& g, const Loss& loss, const Inputs& in, const Tensor& weight,
                                 const Tensor& numbers, const Wants<kMaxInputs>& wants);
// Its tangent, undefined if no input has one.
Tensor composed_tangent(const Loss& loss, const Inputs& in, const Tensor& weight);

// The sample, with eps or torch's own noise; it differentiates by itself. What logvar is, `loss` says.
Tensor composed_sample(const Loss& loss, const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                       const std::optional<at::Generator>& generator);
// For one that was drawn by a kernel: gradients of mu, logvar and eps, and the tangent. The noise is eps, or is made
// from the state.
variable_list composed_sample_gradients(const Loss& loss, const Tensor& dz, const Tensor& mu, const Tensor& logvar,
                                        const Tensor& eps, const Tensor& state, const Wants<3>& wants);
Tensor composed_sample_tangent(const Loss& loss, const Tensor& mu, const Tensor& logvar, const Tensor& eps);

}  // namespace fastvae
