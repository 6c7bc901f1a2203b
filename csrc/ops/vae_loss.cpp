// vae_loss: loss = recon + beta * kl, the parts of reconstruction_loss and kl_normal under one autograd node.
// With scalar reductions the forward pass of training reads its inputs once and writes the gradients of `loss` (3 N + 4
// M); when `loss` is what backward() starts from, nothing is left to compute there. All else recomputes from the saved
// inputs.
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include "latent.h"
#include "reconstruction_loss.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "fastvae.vae_loss";

struct Choice {
  Likelihood likelihood;
  Reduction reduction, kl_reduction;
};

Choice choose(c10::string_view likelihood, c10::string_view reduction,
              const std::optional<c10::string_view>& kl_reduction) {
  Choice c;
  c.likelihood = parse_likelihood(kOp, likelihood);
  c.reduction = parse_reduction(kOp, reduction, "reduction", false);
  c.kl_reduction = parse_reduction(kOp, kl_reduction.value_or(reduction), "kl_reduction", false);
  TORCH_CHECK_VALUE((c.reduction == Reduction::sample) == (c.kl_reduction == Reduction::sample), kOp,
                    ": \"sample\" goes with \"sample\" only, but got reduction=\"", reduction, "\" and kl_reduction=\"",
                    kl_reduction.value_or(reduction), "\"");
  return c;
}

void check(const Tensor& recon_x, const Tensor& x, const Tensor& mu, const Tensor& logvar, const OptionalTensor& beta) {
  check_reconstruction(kOp, recon_x, x);
  check_posterior(kOp, mu, logvar);
  check_same_device(kOp, "recon_x", recon_x, "mu", mu);
  TORCH_CHECK_VALUE(recon_x.sym_size(0) == mu.sym_size(0), kOp,
                    ": recon_x and mu must have the same batch size, but got shapes ", recon_x.sym_sizes(), " and ",
                    mu.sym_sizes());
  if (!beta.has_value()) return;
  TORCH_CHECK_VALUE(beta->dim() == 0, kOp, ": beta must be a float or a 0-dim tensor, but its shape is ",
                    beta->sym_sizes());
  TORCH_CHECK_TYPE(beta->is_floating_point(), kOp,
                   ": beta must be a float or a floating-point tensor, but its dtype is ", dtype_name(*beta),
                   "; give beta.float()");
  check_same_device(kOp, "beta", *beta, "mu", mu);
}

void check_beta(const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(!beta.has_value() || !beta->requires_grad(), kOp,
                    ": beta must not require a gradient, as none is computed for it; give beta.detach()");
}

// ---- On the devices, and Meta.

LatentCall latents(const Tensor& mu, const Tensor& logvar, Reduction reduction, const std::array<bool, 4>& wants) {
  LatentCall call;
  call.mu = mu;
  call.logvar = logvar;
  call.reduction = reduction;
  call.wants = {wants[2], wants[3]};
  return call;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> with_gradients(
    const Tensor& recon_x, const Tensor& x, const Tensor& mu, const Tensor& logvar, double beta,
    const OptionalTensor& beta_tensor, c10::string_view likelihood, c10::string_view reduction,
    std::optional<c10::string_view> kl_reduction, std::array<bool, 4> wants) {
  const Choice c = choose(likelihood, reduction, kl_reduction);
  check(recon_x, x, mu, logvar, beta_tensor);
  LatentCall call = latents(mu, logvar, c.kl_reduction, wants);
  call.want_kl = true;
  call.weight = beta;
  call.weight_at = number_of(beta_tensor);
  const ReconstructionPass r =
      prepare(ReconstructionCall{recon_x, x, c.likelihood, c.reduction, true, {wants[0], wants[1]}});
  const LatentPass l = prepare(call);
  const Tensor &recon = r.result.value, &kl = l.result.kl;
  const Tensor loss = at::empty_like(recon.scalar_type() == at::kDouble ? recon : kl);
  Combination combination;
  if (!loss.is_meta()) combination.loss = loss.data_ptr();
  combination.float64 = loss.scalar_type() == at::kDouble;
  combination.beta = beta;
  combination.weight = call.weight_at;
  run_objective(recon_x, r.args, r.numel, r.sums, l.args, l.numel, l.sums, combination);
  return {loss, recon, kl, defined_only({r.result.d_recon_x, r.result.d_x, l.result.d_mu, l.result.d_logvar})};
}

std::tuple<Tensor, Tensor, Tensor> vae_loss(const Tensor& recon_x, const Tensor& x, const Tensor& mu,
                                            const Tensor& logvar, double beta, const OptionalTensor& beta_tensor,
                                            c10::string_view likelihood, c10::string_view reduction,
                                            std::optional<c10::string_view> kl_reduction) {
  auto [loss, recon, kl, none] =
      with_gradients(recon_x, x, mu, logvar, beta, beta_tensor, likelihood, reduction, kl_reduction, {});
  return {loss, recon, kl};
}

std::tuple<Tensor, Tensor, Tensor> for_compiler(const Tensor& recon_x, const Tensor& x, const Tensor& mu,
                                                const Tensor& logvar, double beta, const OptionalTensor& beta_tensor,
                                                c10::string_view likelihood, c10::string_view reduction,
                                                std::optional<c10::string_view> kl_reduction) {
  const Choice c = choose(likelihood, reduction, kl_reduction);
  check(recon_x, x, mu, logvar, beta_tensor);
  check_beta(beta_tensor);
  const Tensor recon = reconstruction_for_compiler(recon_x, x, c.likelihood, c.reduction);
  const Tensor kl = kl_for_compiler(mu, logvar, c.kl_reduction);
  const Tensor wide_kl = kl.to(at::kDouble);
  const Tensor loss = recon.to(at::kDouble) + (beta_tensor.has_value() ? wide_kl * *beta_tensor : wide_kl * beta);
  return {loss.to(recon.scalar_type() == at::kDouble ? at::kDouble : kl.scalar_type()), recon, kl};
}

// Gradients of recon_x, x, mu and logvar, from those of loss, recon and kl, some of which may be absent.
std::vector<Tensor> gradients(const OptionalTensor& g_loss, const OptionalTensor& g_recon, const OptionalTensor& g_kl,
                              const Tensor& recon_x, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                              double beta, const OptionalTensor& beta_tensor, c10::string_view likelihood,
                              c10::string_view reduction, std::optional<c10::string_view> kl_reduction,
                              std::array<bool, 4> wants) {
  const Choice c = choose(likelihood, reduction, kl_reduction);
  ReconstructionPass r;
  if (wants[0] || wants[1]) {
    const Tensor g = g_loss && g_recon ? *g_loss + *g_recon : (g_loss ? *g_loss : *g_recon);
    r = prepare(ReconstructionCall{recon_x, x, c.likelihood, c.reduction, false, {wants[0], wants[1]}, g});
  }
  LatentPass l;
  if (wants[2] || wants[3]) {
    LatentCall call = latents(mu, logvar, c.kl_reduction, wants);
    if (!g_kl) {
      // Alone, the gradient of loss meets the same roundings here as in the forward pass: beta goes into the scale.
      call.upstream = *g_loss;
      call.weight = beta;
      call.weight_at = number_of(beta_tensor);
    } else {
      call.upstream = *g_kl;
      if (g_loss)
        call.upstream = *g_kl + (beta_tensor ? (*g_loss * *beta_tensor).to(g_kl->scalar_type()) : *g_loss * beta);
    }
    l = prepare(call);
  }
  run_objective(recon_x, r.args, r.numel, r.sums, l.args, l.numel, l.sums, {});
  return defined_only({r.result.d_recon_x, r.result.d_x, l.result.d_mu, l.result.d_logvar});
}

// ---- Autograd.

struct VaeLoss {
  static constexpr const char* kName = "FastvaeVaeLossBackward";
  static constexpr int kInputs = 4, kSaved = 5;  // recon_x, x, mu, logvar; and beta, if a tensor
  double beta;
  std::string likelihood, reduction, kl_reduction;
  auto options() const { return std::tie(beta, likelihood, reduction, kl_reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, 5>& saved, const Wants<4>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_vae_loss_gradients");
    const bool through_recon = g[0].defined() || g[1].defined(), through_kl = g[0].defined() || g[2].defined();
    const Wants<4> made{wants[0] && through_recon, wants[1] && through_recon, wants[2] && through_kl,
                        wants[3] && through_kl};
    return placed(op.call(optional(g[0]), optional(g[1]), optional(g[2]), saved[0], saved[1], saved[2], saved[3], beta,
                          optional(saved[4]), likelihood, reduction, kl_reduction, made),
                  made);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 5>& saved,
                                        const Wants<4>& wants) const {
    const Choice c = choose(likelihood, reduction, kl_reduction);
    const auto sum = [](const Tensor& a, const Tensor& b) {
      return a.defined() && b.defined() ? a + b : (a.defined() ? a : b);
    };
    const Tensor beta_g = !g[0].defined() ? Tensor() : (saved[4].defined() ? g[0] * saved[4] : g[0] * beta);
    const Tensor g_recon = sum(g[0], g[1]), g_kl = sum(beta_g, g[2]);
    variable_list all(4);
    if (g_recon.defined()) {
      auto d = reconstruction_differentiable_backward(g_recon, saved[0], saved[1], c.likelihood, c.reduction,
                                                      {wants[0], wants[1]});
      all[0] = d[0];
      all[1] = d[1];
    }
    if (g_kl.defined()) {
      auto d = kl_differentiable_backward(g_kl, saved[2], saved[3], {}, {}, c.kl_reduction,
                                          {wants[2], wants[3], false, false});
      all[2] = d[0];
      all[3] = d[1];
    }
    return all;
  }
};

std::tuple<Tensor, Tensor, Tensor> autograd(const Tensor& recon_x, const Tensor& x, const Tensor& mu,
                                            const Tensor& logvar, double beta, const OptionalTensor& beta_tensor,
                                            c10::string_view likelihood, c10::string_view reduction,
                                            std::optional<c10::string_view> kl_reduction) {
  static const auto value_op = find_op<decltype(vae_loss)>("fastvae::vae_loss");
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_vae_loss_with_gradients");
  const std::array<Tensor, 4> inputs{recon_x, x, mu, logvar};
  check_beta(beta_tensor);
  const bool differentiate = torch::autograd::compute_requires_grad(recon_x, x, mu, logvar);
  Tensor loss, recon, kl;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && choose(likelihood, reduction, kl_reduction).reduction != Reduction::sample &&
        may_keep_gradients(inputs)) {
      const auto wants = wanted(inputs);
      std::vector<Tensor> made;
      std::tie(loss, recon, kl, made) =
          with_gradients_op.call(recon_x, x, mu, logvar, beta, beta_tensor, likelihood, reduction, kl_reduction, wants);
      kept = placed(made, wants);
    } else {
      std::tie(loss, recon, kl) =
          value_op.call(recon_x, x, mu, logvar, beta, beta_tensor, likelihood, reduction, kl_reduction);
    }
  }
  if (differentiate) {
    const VaeLoss op{beta, std::string(likelihood), std::string(reduction),
                     std::string(kl_reduction.value_or(reduction))};
    const auto node = record(op, inputs, {recon_x, x, mu, logvar, or_undefined(beta_tensor)}, std::move(kept));
    torch::autograd::set_history(loss, node);
    torch::autograd::set_history(recon, node);
    torch::autograd::set_history(kl, node);
  }
  const Choice c = choose(likelihood, reduction, kl_reduction);
  const Tensor d_recon = reconstruction_tangent({recon_x, x}, c.likelihood, c.reduction);
  const Tensor d_kl = kl_tangent({mu, logvar, {}, {}}, c.kl_reduction);
  set_tangent(recon, d_recon);
  set_tangent(kl, d_kl);
  if (d_kl.defined()) {
    const Tensor weighted = beta_tensor.has_value() ? d_kl * *beta_tensor : d_kl * beta;
    set_tangent(loss, d_recon.defined() ? d_recon + weighted : weighted);
  } else {
    set_tangent(loss, d_recon);
  }
  return {loss, recon, kl};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def(
      "vae_loss(Tensor recon_x, Tensor x, Tensor mu, Tensor logvar, float beta=1.0, Tensor? beta_tensor=None, "
      "str likelihood=\"mse\", str reduction=\"batchmean\", str? kl_reduction=None) -> (Tensor loss, Tensor recon, "
      "Tensor kl)",
      kPure);
  m.def(
      "_vae_loss_with_gradients(Tensor recon_x, Tensor x, Tensor mu, Tensor logvar, float beta, Tensor? beta_tensor, "
      "str likelihood, "
      "str reduction, str? kl_reduction, bool[4] wants) -> (Tensor loss, Tensor recon, Tensor kl, Tensor[] gradients)",
      kPure);
  m.def(
      "_vae_loss_gradients(Tensor? g_loss, Tensor? g_recon, Tensor? g_kl, Tensor recon_x, Tensor x, Tensor mu, Tensor "
      "logvar, float beta, "
      "Tensor? beta_tensor, str likelihood, str reduction, str? kl_reduction, bool[4] wants) -> Tensor[]",
      kPure);
  m.def(
      "vae_loss_for_compiler(Tensor recon_x, Tensor x, Tensor mu, Tensor logvar, float beta, Tensor? beta_tensor, "
      "str likelihood, str reduction, str? kl_reduction) -> (Tensor loss, Tensor recon, Tensor kl)",
      for_compiler, kPure);
  implement(m, "vae_loss", vae_loss);
  implement_inner(m, "_vae_loss_with_gradients", with_gradients);
  implement_inner(m, "_vae_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("vae_loss", autograd); }

}  // namespace fastvae
