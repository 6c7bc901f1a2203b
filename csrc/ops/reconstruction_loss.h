// The reconstruction part of the objective, as reconstruction_loss and vae_loss use it.
#pragma once

#include "autograd.h"
#include "likelihood.h"

namespace fastvae {

void check_reconstruction(const char* op, const Tensor& recon_x, const Tensor& x);

struct ReconstructionResult {
  Tensor value;           // undefined if not wanted
  Tensor d_recon_x, d_x;  // undefined if not wanted
};

// The reduced value and/or its gradients, times upstream if that is defined, in one pass.
struct ReconstructionCall {
  const Tensor &recon_x, &x;
  Likelihood likelihood;
  Reduction reduction;
  bool want_value;
  Wants<2> wants = {};
  Tensor upstream = {};
};

// A pass that is ready to run; on Meta, its results alone.
struct ReconstructionPass {
  ReconstructionResult result;
  ReconstructionArgs args;
  Tensor upstream;  // what args points to must live until it has run
  int64_t numel = 0;
  Sums sums;
};
ReconstructionPass prepare(const ReconstructionCall& call);
ReconstructionResult reconstruction_pass(const ReconstructionCall& call);

variable_list reconstruction_differentiable_backward(const Tensor& g, const Tensor& recon_x, const Tensor& x,
                                                     Likelihood likelihood, Reduction reduction, Wants<2> wants);

// What compiled programs get: see reconstruction_loss.cpp.
Tensor reconstruction_for_compiler(const Tensor& recon_x, const Tensor& x, Likelihood likelihood, Reduction reduction);
// Its tangent, undefined if no input has one.
Tensor reconstruction_tangent(const std::array<Tensor, 2>& inputs, Likelihood likelihood, Reduction reduction);

}  // namespace fastvae
