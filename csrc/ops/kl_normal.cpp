// kl_normal: KL(N(mu, exp logvar) || prior), the prior N(0, 1) or another Gaussian.
// With a scalar reduction the forward pass of training reads the parameters once and writes their gradients; the other
// reductions recompute them in the backward pass.
#include <ATen/ops/exp.h>

#include "../math/gaussian.h"
#include "elements.h"
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

// ---- For a compiler.

// The value and the derivatives of each element, in aten ops.
struct Composed {
  Tensor value, d_mu, d_logvar;
};
template <class S>
Composed compose_as(const Tensor& mu, const Tensor& logvar) {
  const auto kl = kl_standard(Elements<S>(mu), Elements<S>(logvar), Elements<S>(at::exp(logvar)));
  return {kl.value.tensor, kl.d_mu.tensor, kl.d_logvar.tensor};
}
Composed compose(const Tensor& mu, const Tensor& logvar) {
  return logvar.scalar_type() == at::kDouble ? compose_as<double>(mu, logvar) : compose_as<float>(mu, logvar);
}

// Its gradients are the formula's as well: those of the value's ops, and Inductor's expm1, lose their digits near the
// prior.
struct ComposedKl {
  static constexpr const char* kName = "FastvaeComposedKlBackward";
  static constexpr int kInputs = 2, kSaved = 2;
  int64_t reduction;
  auto options() const { return std::tie(reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, 2>& saved, const Wants<2>& wants) const {
    const Composed kl = compose(widened(saved[0]), widened(saved[1]));
    const Tensor factor = spread(g[0], static_cast<Reduction>(reduction), saved[0]);
    const auto finish = [&](int i, const Tensor& d) {
      return wants[i] ? (factor * d).to(saved[i].scalar_type()) : Tensor();
    };
    return {finish(0, kl.d_mu), finish(1, kl.d_logvar)};
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 2>& saved,
                                        const Wants<2>& wants) const {
    variable_list d = kl_differentiable_backward(g[0], saved[0], saved[1], {}, {}, static_cast<Reduction>(reduction),
                                                 {wants[0], wants[1]});
    d.resize(kInputs);
    return d;
  }
};

}  // namespace

Tensor kl_for_compiler(const Tensor& mu, const Tensor& logvar, Reduction reduction) {
  const Tensor m = widened(mu), l = widened(logvar);
  if (is_batched(mu) || is_batched(logvar)) return reduced(compose(m, l).value, reduction);  // vmap sees what runs
  Tensor kl;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    kl = reduced(compose(m, l).value, reduction);
  }
  if (torch::autograd::compute_requires_grad(mu, logvar)) {
    torch::autograd::set_history(kl, record(ComposedKl{static_cast<int64_t>(reduction)}, {mu, logvar}, {mu, logvar}));
  }
  set_tangent(kl, kl_tangent({mu, logvar, Tensor(), Tensor()}, reduction));
  return kl;
}

Tensor kl_normal_for_compiler(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                              const OptionalTensor& logvar_p, c10::string_view reduction) {
  const LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, true);
  if (!call.mu_p.defined()) return kl_for_compiler(mu, logvar, *call.reduction);
  // In the units of the prior it is N(0, 1).
  const Tensor p = widened(call.logvar_p);
  return kl_for_compiler((widened(mu) - widened(call.mu_p)) * at::exp(-0.5 * p), widened(logvar) - p, *call.reduction);
}

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
  m.def("kl_normal_for_compiler(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, str reduction) -> Tensor",
        kl_normal_for_compiler, kPure);
  implement(m, "kl_normal", kl_normal);
  implement_elsewhere(m, "kl_normal", kl_normal_for_compiler);
  implement_inner(m, "_kl_normal_with_gradients", with_gradients);
  implement_inner(m, "_kl_normal_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("kl_normal", autograd); }

}  // namespace fastvae
