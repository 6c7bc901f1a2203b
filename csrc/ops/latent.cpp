#include "latent.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sub.h>

namespace fastvae {

LatentPass prepare(const LatentCall& call) {
  const Tensor& like = call.logvar;
  const bool sample = call.want_z || call.dz.defined();
  LatentPass pass;
  LatentResult& r = pass.result;
  if (call.want_z)
    r.z =
        at::empty_like(call.mu, call.mu.options().dtype(c10::promoteTypes(call.mu.scalar_type(), like.scalar_type())));
  if (call.want_kl) r.kl = empty_result(*call.reduction, like);
  r.d_mu = empty_gradient(call.wants[0], call.mu);
  r.d_logvar = empty_gradient(call.wants[1], call.logvar);
  r.d_mu_p = empty_gradient(call.wants[2], call.mu_p);
  r.d_logvar_p = empty_gradient(call.wants[3], call.logvar_p);
  r.d_eps = empty_gradient(call.wants[4], call.eps);
  if (like.is_meta()) return pass;
  // Noise belongs to elements in their logical order; all else may go by memory.
  const bool draws = sample && !call.eps.defined();
  const auto order =
      draws ? std::vector<int64_t>() : memory_order({call.mu, like, call.dz}, call.reduction == Reduction::sample);
  const auto view = [&](const Tensor& t) { return view_of(t, order); };

  LatentArgs& args = pass.args;
  args.float64 = like.scalar_type() == at::kDouble;
  args.mu = view(call.mu);
  args.logvar = view(call.logvar);
  args.mu_p = view(call.mu_p);
  args.logvar_p = view(call.logvar_p);
  args.z = view(r.z);
  args.dz = view(call.dz);
  args.eps = view(call.eps);
  args.noise = call.noise;
  args.d_mu = view(r.d_mu);
  args.d_logvar = view(r.d_logvar);
  args.d_mu_p = view(r.d_mu_p);
  args.d_logvar_p = view(r.d_logvar_p);
  args.d_eps = view(r.d_eps);
  if (call.reduction.has_value()) {
    args.prior = call.mu_p.defined() ? Prior::given : Prior::standard;
    args.may_be_kept = !sample && is_scalar(*call.reduction);
    args.scale = call.weight / divisor_value(*call.reduction, like);
    args.weight = call.weight_at;
    args.upstream = upstream_view(call.upstream, *call.reduction, like, order);
    if (call.want_kl && call.reduction == Reduction::none) args.value = view(r.kl);
    pass.sums = sums_of(r.kl, *call.reduction, like);
  }
  pass.numel = like.numel();
  pass.upstream = call.upstream;
  return pass;
}

LatentResult latent_pass(const LatentCall& call) {
  const LatentPass pass = prepare(call);
  run_latent(call.logvar, pass.args, pass.numel, pass.sums);
  return pass.result;
}

LatentCall kl_call(const char* op, const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                   const OptionalTensor& logvar_p, c10::string_view reduction, bool allow_none) {
  LatentCall call;
  call.reduction = parse_reduction(op, reduction, "reduction", allow_none);
  check_posterior(op, mu, logvar);
  check_prior(op, mu, mu_p, logvar_p);
  call.mu = mu;
  call.logvar = logvar;
  call.mu_p = or_undefined(mu_p);
  call.logvar_p = or_undefined(logvar_p);
  return call;
}

variable_list kl_differentiable_backward(const Tensor& g, const Tensor& mu, const Tensor& logvar, const Tensor& mu_p,
                                         const Tensor& logvar_p, Reduction reduction, Wants<4> wants) {
  const Tensor factor = spread(g, reduction, mu);
  const Tensor m = widened(mu), l = widened(logvar);
  const bool standard = !mu_p.defined();
  const Tensor p = standard ? Tensor() : widened(logvar_p);
  const Tensor delta = standard ? m : m - widened(mu_p);
  const Tensor pull = standard ? m : delta * at::exp(-p);
  const Tensor half_expm1 = 0.5 * at::expm1(standard ? l : l - p);
  const auto finish = [&](bool want, const Tensor& d, const Tensor& like) {
    return want ? (factor * d).to(like.scalar_type()) : Tensor();
  };
  return {finish(wants[0], pull, mu), finish(wants[1], half_expm1, logvar),
          finish(wants[2], wants[2] ? -pull : pull, mu_p),
          finish(wants[3], wants[3] ? -(half_expm1 + 0.5 * delta * pull) : pull, logvar_p)};
}

Tensor kl_tangent(const std::array<Tensor, 4>& inputs, Reduction reduction) {
  const auto tangents = tangents_of(inputs);
  const Wants<4> given = defined(tangents);
  if (given == Wants<4>{}) return {};
  const Tensor mu = wide_primal(inputs[0]);
  const auto d = kl_differentiable_backward(at::ones({}, mu.options()), mu, wide_primal(inputs[1]),
                                            wide_primal(inputs[2]), wide_primal(inputs[3]), Reduction::none, given);
  return reduced(along(d, tangents), reduction);
}

variable_list sample_differentiable_backward(const Tensor& dz, const Tensor& logvar, const Tensor& eps,
                                             const Tensor& state, Wants<3> wants) {
  variable_list g(3);
  if (wants[0]) g[0] = dz;
  const Tensor scaled = wants[1] || wants[2] ? widened(dz) * at::exp(0.5 * widened(logvar)) : Tensor();
  if (wants[1])
    g[1] = (0.5 * scaled * (eps.defined() ? eps.to(scaled.scalar_type()) : noise_of(logvar, state)))
               .to(logvar.scalar_type());
  if (wants[2]) g[2] = scaled.to(eps.scalar_type());
  return g;
}

Tensor sample_tangent(const std::array<Tensor, 3>& inputs) {
  const auto tangents = tangents_of(inputs);
  const Wants<3> given = defined(tangents);
  if (given == Wants<3>{}) return {};
  const Tensor logvar = wide_primal(inputs[1]);
  const auto d =
      sample_differentiable_backward(at::ones({}, logvar.options()), logvar, wide_primal(inputs[2]), {}, given);
  return along(d, tangents);
}

}  // namespace fastvae
