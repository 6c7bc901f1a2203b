// The formulas in aten ops: for compilers, which fuse neighbouring ops, for second derivatives and for forward mode.
#pragma once

#include "autograd.h"

namespace fastvae {

// The loss. `numbers`, if defined, replaces loss.numbers: a compiler takes a tensor as an input, not as a constant.
Tensor composed_loss(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers);
// The gradients of the loss, times its upstream gradient g; differentiable.
variable_list composed_gradients(const Tensor& g, const Loss& loss, const Inputs& in, const Tensor& weight,
                                 const Tensor& numbers, const Wants<kMaxInputs>& wants);
// The tangent of the loss, undefined if no input has one.
Tensor composed_tangent(const Loss& loss, const Inputs& in, const Tensor& weight);

// The sample, with eps or torch's own noise; autograd differentiates it. loss.transform says what `logvar` is.
Tensor composed_sample(const Loss& loss, const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                       const std::optional<at::Generator>& generator);
// For a kernel's sample: gradients of mu, logvar and eps, and the tangent. The noise is eps, or drawn from the state.
variable_list composed_sample_gradients(const Loss& loss, const Tensor& dz, const Tensor& mu, const Tensor& logvar,
                                        const Tensor& eps, const Tensor& state, const Wants<3>& wants);
Tensor composed_sample_tangent(const Loss& loss, const Tensor& mu, const Tensor& logvar, const Tensor& eps);

}  // namespace fastvae
