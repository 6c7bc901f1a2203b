// reparameterize: z = mu + sigma * eps. The noise is made in registers and never stored: the backward pass remakes it
// from its (seed, offset). mu's gradient is z's itself.
#include <ATen/ops/exp.h>

#include "latent.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "fastvae.reparameterize";

// ---- On the devices, and Meta.

std::tuple<Tensor, Tensor> draw_and_sample(const Tensor& mu, const Tensor& logvar,
                                           std::optional<at::Generator> generator, int64_t /*draw*/) {
  check_posterior(kOp, mu, logvar);
  check_noise(kOp, mu, std::nullopt, generator);
  LatentCall call;
  call.mu = mu;
  call.logvar = logvar;
  call.want_z = true;
  const Draw drawn = draw(mu, generator);
  call.noise = drawn.noise;
  return {latent_pass(call).z, drawn.state};
}

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                      std::optional<at::Generator> generator) {
  if (!eps.has_value()) return std::get<0>(draw_and_sample(mu, logvar, generator, 0));
  check_posterior(kOp, mu, logvar);
  check_noise(kOp, mu, eps, generator);
  LatentCall call;
  call.mu = mu;
  call.logvar = logvar;
  call.want_z = true;
  call.eps = *eps;
  return latent_pass(call).z;
}

std::vector<Tensor> gradients(const Tensor& dz, const Tensor& logvar, const OptionalTensor& eps,
                              const OptionalTensor& state, std::array<bool, 2> wants) {
  LatentCall call;
  call.logvar = logvar;
  call.dz = dz;
  call.eps = or_undefined(eps);
  if (state.has_value()) call.noise = remembered(*state);
  call.wants = {false, wants[0], false, false, wants[1]};
  const LatentResult r = latent_pass(call);
  return defined_only({r.d_logvar, r.d_eps});
}

// ---- Autograd.

struct Reparameterize {
  static constexpr const char* kName = "FastvaeReparameterizeBackward";
  static constexpr int kInputs = 3, kSaved = 3;  // mu, logvar, eps; logvar, eps, state
  std::tuple<> options() const { return {}; }

  variable_list backward(const variable_list& g, const std::array<Tensor, 3>& saved, const Wants<3>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_reparameterize_gradients");
    variable_list all(3);
    if (wants[0]) all[0] = g[0];
    if (wants[1] || wants[2]) {
      const Wants<2> rest{wants[1], wants[2]};
      const auto made = placed(op.call(g[0], saved[0], optional(saved[1]), optional(saved[2]), rest), rest);
      all[1] = made[0];
      all[2] = made[1];
    }
    return all;
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 3>& saved,
                                        const Wants<3>& wants) const {
    return sample_differentiable_backward(g[0], saved[0], saved[1], saved[2], wants);
  }
};

Tensor autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                std::optional<at::Generator> generator) {
  static const auto value_op = find_op<decltype(reparameterize)>("fastvae::reparameterize");
  static const auto draw_op = find_op<decltype(draw_and_sample)>("fastvae::_reparameterize_draw");
  const std::array<Tensor, 3> inputs{mu, logvar, or_undefined(eps)};
  if (!eps.has_value() && (is_transformed(mu) || is_transformed(logvar))) {
    return autograd(mu, logvar, noise_for_transform(mu, generator), std::nullopt);
  }
  const bool differentiate = torch::autograd::compute_requires_grad(mu, logvar, eps);
  Tensor z, state;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (!eps.has_value() && (differentiate || is_traced(mu))) {
      std::tie(z, state) = draw_op.call(mu, logvar, generator, next_draw(mu));
    } else {
      z = value_op.call(mu, logvar, eps, generator);
    }
  }
  if (differentiate) torch::autograd::set_history(z, record(Reparameterize{}, inputs, {logvar, inputs[2], state}));
  set_tangent(z, sample_tangent(inputs));
  return z;
}

}  // namespace

Tensor reparameterize_for_compiler(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                                   std::optional<at::Generator> generator) {
  check_posterior(kOp, mu, logvar);
  check_noise(kOp, mu, eps, generator);
  const Tensor m = widened(mu);
  const Tensor noise = eps.has_value() ? eps->to(m.scalar_type()) : torch_noise(mu, generator);
  return (m + at::exp(0.5 * widened(logvar)) * noise).to(c10::promoteTypes(mu.scalar_type(), logvar.scalar_type()));
}

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("reparameterize(Tensor mu, Tensor logvar, Tensor? eps=None, Generator? generator=None) -> Tensor", kRandom);
  m.def("_reparameterize_draw(Tensor mu, Tensor logvar, Generator? generator, int draw) -> (Tensor z, Tensor state)",
        kRandom);
  m.def("_reparameterize_gradients(Tensor dz, Tensor logvar, Tensor? eps, Tensor? state, bool[2] wants) -> Tensor[]",
        kPure);
  m.def("reparameterize_for_compiler(Tensor mu, Tensor logvar, Tensor? eps=None, Generator? generator=None) -> Tensor",
        reparameterize_for_compiler, kRandom);
  implement(m, "reparameterize", reparameterize);
  implement_elsewhere(m, "reparameterize", reparameterize_for_compiler);
  implement_inner(m, "_reparameterize_draw", draw_and_sample);
  implement_inner(m, "_reparameterize_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("reparameterize", autograd); }

}  // namespace fastvae
