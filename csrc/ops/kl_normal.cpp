// kl_normal: KL(N(mu, exp logvar) || prior), the prior N(0, 1) or another Gaussian.
// With a scalar reduction the forward pass of training reads the parameters once and writes their gradients; the other
// reductions recompute them in the backward pass.
#include "latent.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "fastvae.kl_normal";

// ---- On the devices, and Meta.

Tensor kl_normal(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                 c10::string_view reduction) {
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, true);
  call.want_kl = true;
  return latent_pass(call).kl;
}

std::vector<Tensor> listed(const LatentResult& r) { return defined_only({r.d_mu, r.d_logvar, r.d_mu_p, r.d_logvar_p}); }

std::tuple<Tensor, std::vector<Tensor>> with_gradients(const Tensor& mu, const Tensor& logvar,
                                                       const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                                                       c10::string_view reduction, std::array<bool, 4> wants) {
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, true);
  call.want_kl = true;
  std::copy(wants.begin(), wants.end(), call.wants.begin());
  const LatentResult r = latent_pass(call);
  return {r.kl, listed(r)};
}

std::vector<Tensor> gradients(const Tensor& g, const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                              const OptionalTensor& logvar_p, c10::string_view reduction, std::array<bool, 4> wants) {
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, true);
  call.upstream = g;
  std::copy(wants.begin(), wants.end(), call.wants.begin());
  return listed(latent_pass(call));
}

// ---- Autograd.

struct KlNormal {
  static constexpr const char* kName = "FastvaeKlNormalBackward";
  static constexpr int kInputs = 4, kSaved = 4;
  std::string reduction;
  auto options() const { return std::tie(reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, 4>& saved, const Wants<4>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_kl_normal_gradients");
    return placed(op.call(g[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]), reduction, wants), wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 4>& saved,
                                        const Wants<4>& wants) const {
    return kl_differentiable_backward(g[0], saved[0], saved[1], saved[2], saved[3],
                                      parse_reduction(kOp, reduction, "reduction", true), wants);
  }
};

Tensor autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                c10::string_view reduction) {
  static const auto value_op = find_op<decltype(kl_normal)>("fastvae::kl_normal");
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_kl_normal_with_gradients");
  const std::array<Tensor, 4> inputs{mu, logvar, or_undefined(mu_p), or_undefined(logvar_p)};
  const bool differentiate = torch::autograd::compute_requires_grad(mu, logvar, mu_p, logvar_p);
  Tensor value;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && is_scalar(parse_reduction(kOp, reduction, "reduction", true)) && may_keep_gradients(inputs)) {
      const auto wants = wanted(inputs);
      std::vector<Tensor> made;
      std::tie(value, made) = with_gradients_op.call(mu, logvar, mu_p, logvar_p, reduction, wants);
      kept = placed(made, wants);
    } else {
      value = value_op.call(mu, logvar, mu_p, logvar_p, reduction);
    }
  }
  if (differentiate) {
    torch::autograd::set_history(value, record(KlNormal{std::string(reduction)}, inputs, inputs, std::move(kept)));
  }
  set_tangent(value, kl_tangent(inputs, parse_reduction(kOp, reduction, "reduction", true)));
  return value;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def(
      "kl_normal(Tensor mu, Tensor logvar, Tensor? mu_p=None, Tensor? logvar_p=None, str reduction=\"batchmean\") "
      "-> Tensor",
      kPure);
  m.def(
      "_kl_normal_with_gradients(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, str reduction, bool[4] "
      "wants) -> "
      "(Tensor, Tensor[])",
      kPure);
  m.def(
      "_kl_normal_gradients(Tensor g, Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, str reduction, bool[4] "
      "wants) -> "
      "Tensor[]",
      kPure);
  implement(m, "kl_normal", kl_normal);
  implement_inner(m, "_kl_normal_with_gradients", with_gradients);
  implement_inner(m, "_kl_normal_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("kl_normal", autograd); }

}  // namespace fastvae
