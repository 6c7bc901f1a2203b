// One pass over the latents, as kl_normal, reparameterize, sample_and_kl and vae_loss use it: a sample, the KL
// divergence, their gradients, or what is wanted of them together.
#pragma once

#include "autograd.h"

namespace fastvae {

struct LatentCall {
  Tensor mu, logvar;
  Tensor mu_p, logvar_p;  // undefined: the prior is N(0, 1)
  // The KL divergence, if there is a reduction.
  std::optional<Reduction> reduction;
  double weight = 1;     // its gradients are those of weight * KL ...
  Number weight_at;      // ... times this, if there
  Tensor upstream;       // ... times this, if defined
  bool want_kl = false;  // its value
  // The sample: forward (want_z) or backward (dz).
  bool want_z = false;
  Tensor dz;
  Tensor eps;           // given noise, or
  Noise noise;          // the noise to make
  Wants<5> wants = {};  // gradients of mu, logvar, mu_p, logvar_p, eps
};

struct LatentResult {
  Tensor z, kl;
  Tensor d_mu, d_logvar, d_mu_p, d_logvar_p, d_eps;
};

// A pass that is ready to run; on Meta, its results alone.
struct LatentPass {
  LatentResult result;
  LatentArgs args;
  Tensor upstream;  // what args points to must live until it has run
  int64_t numel = 0;
  Sums sums;
};
LatentPass prepare(const LatentCall& call);
LatentResult latent_pass(const LatentCall& call);
// The checked arguments of an op that has a KL divergence.
LatentCall kl_call(const char* op, const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                   const OptionalTensor& logvar_p, c10::string_view reduction, bool allow_none);

// The noise of a state, in the type of the arithmetic (float32, or float64 for float64). Callable while tracing.
Tensor noise_of(const Tensor& like, const Tensor& state);

// Noise by torch's own generator, where ours cannot be made.
Tensor torch_noise(const Tensor& like, const std::optional<at::Generator>& generator);

// Gradients of the KL divergence in aten ops, for second derivatives; mu_p and logvar_p may be undefined.
variable_list kl_differentiable_backward(const Tensor& g, const Tensor& mu, const Tensor& logvar, const Tensor& mu_p,
                                         const Tensor& logvar_p, Reduction reduction, Wants<4> wants);
// Its tangent, undefined if no input has one.
Tensor kl_tangent(const std::array<Tensor, 4>& inputs, Reduction reduction);
// KL from N(0, 1) in aten ops, which a compiler fuses with what stands beside them.
Tensor kl_for_compiler(const Tensor& mu, const Tensor& logvar, Reduction reduction);
// The ops in aten ops, for ONNX and for devices that have no kernels.
Tensor kl_normal_for_compiler(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                              const OptionalTensor& logvar_p, c10::string_view reduction);
Tensor reparameterize_for_compiler(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                                   std::optional<at::Generator> generator);
// Gradients of mu, logvar and eps through the sample.
variable_list sample_differentiable_backward(const Tensor& dz, const Tensor& logvar, const Tensor& eps,
                                             const Tensor& state, Wants<3> wants);
Tensor sample_tangent(const std::array<Tensor, 3>& inputs);
// Noise as a tensor of its own, where the op cannot draw for itself: vmap, which may lie outside of what
// differentiates, knows how to draw this.
Tensor noise_for_transform(const Tensor& like, const std::optional<at::Generator>& generator);

}  // namespace fastvae
