// vae_loss: loss = recon + beta * kl, the parts of reconstruction_loss and kl_normal under one autograd node.
// With scalar reductions the forward pass of training reads its inputs once and writes the gradients of `loss` (3 N + 4
// M); when `loss` is what backward() starts from, nothing is left to compute there. All else recomputes from the saved
// inputs.
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>

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
  check_dtype(kOp, "beta", *beta);
  check_same_device(kOp, "beta", *beta, "mu", mu);
}

void check_beta(const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(
      !beta.has_value() || !beta->requires_grad(), kOp,
      ": beta must not require a gradient, as none is computed for it; give beta.detach(), or, to learn it, "
      "add the terms yourself: recon + beta * kl");
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

// The two terms; their weighted sum is the caller's, in Python, where a compiler sees what beta is.
std::tuple<Tensor, Tensor> for_compiler(const Tensor& recon_x, const Tensor& x, const Tensor& mu, const Tensor& logvar,
                                        const OptionalTensor& beta, c10::string_view likelihood,
                                        c10::string_view reduction, std::optional<c10::string_view> kl_reduction) {
  const Choice c = choose(likelihood, reduction, kl_reduction);
  check(recon_x, x, mu, logvar, beta);
  check_beta(beta);
  return {reconstruction_for_compiler(recon_x, x, c.likelihood, c.reduction),
          kl_for_compiler(mu, logvar, c.kl_reduction)};
}

// On devices without kernels. Not in float64, which MPS does not have.
std::tuple<Tensor, Tensor, Tensor> elsewhere(const Tensor& recon_x, const Tensor& x, const Tensor& mu,
                                             const Tensor& logvar, double beta, const OptionalTensor& beta_tensor,
                                             c10::string_view likelihood, c10::string_view reduction,
                                             std::optional<c10::string_view> kl_reduction) {
  const auto [recon, kl] = for_compiler(recon_x, x, mu, logvar, beta_tensor, likelihood, reduction, kl_reduction);
  return {recon + (beta_tensor.has_value() ? kl * beta_tensor->to(kl.scalar_type()) : kl * beta), recon, kl};
}

// Gradients of recon_x and x from that of recon, and of mu and logvar from that of kl, times beta.
std::vector<Tensor> gradients(const OptionalTensor& g_recon, const OptionalTensor& g_kl, const Tensor& recon_x,
                              const Tensor& x, const Tensor& mu, const Tensor& logvar, double beta,
                              const OptionalTensor& beta_tensor, c10::string_view likelihood,
                              c10::string_view reduction, std::optional<c10::string_view> kl_reduction,
                              std::array<bool, 4> wants) {
  const Choice c = choose(likelihood, reduction, kl_reduction);
  ReconstructionPass r;
  if (wants[0] || wants[1])
    r = prepare(ReconstructionCall{recon_x, x, c.likelihood, c.reduction, false, {wants[0], wants[1]}, *g_recon});
  LatentPass l;
  if (wants[2] || wants[3]) {
    LatentCall call = latents(mu, logvar, c.kl_reduction, wants);
    call.upstream = *g_kl;
    call.weight = beta;
    call.weight_at = number_of(beta_tensor);
    l = prepare(call);
  }
  run_objective(recon_x, r.args, r.numel, r.sums, l.args, l.numel, l.sums, {});
  return defined_only({r.result.d_recon_x, r.result.d_x, l.result.d_mu, l.result.d_logvar});
}

// ---- Autograd.

Tensor sum(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a + b : (a.defined() ? a : b); }

struct VaeLoss {
  static constexpr const char* kName = "FastvaeVaeLossBackward";
  static constexpr int kInputs = 4, kSaved = 5;  // recon_x, x, mu, logvar; and beta, if a tensor
  double beta;
  std::string likelihood, reduction, kl_reduction;
  auto options() const { return std::tie(likelihood, reduction, kl_reduction); }

  // A compiled backward pass takes beta as an input: as a constant it would be compiled again for each new one.
  void lift_numbers(std::array<torch::autograd::SavedVariable, 5>& saved) {
    if (lifted_ || saved[4].unpack().defined()) return;
    saved[4] = torch::autograd::SavedVariable(at::scalar_tensor(beta, at::kDouble), /*is_output=*/false);
    lifted_ = true;
  }

  variable_list backward(const variable_list& g, const std::array<Tensor, 5>& saved, const Wants<4>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_vae_loss_gradients");
    const Tensor g_recon = sum(g[0], g[1]);
    Tensor g_kl = g[0];
    // Alone, the gradient of loss meets the same roundings in the kernel as in the forward pass: beta goes there.
    const bool in_kernel = g[0].defined() && !g[2].defined() && !lifted_;
    if (!in_kernel) g_kl = sum(weighted(g[0], saved[4]), g[2]);
    const Wants<4> made{wants[0] && g_recon.defined(), wants[1] && g_recon.defined(), wants[2] && g_kl.defined(),
                        wants[3] && g_kl.defined()};
    return placed(
        op.call(optional(g_recon), optional(g_kl), saved[0], saved[1], saved[2], saved[3], in_kernel ? beta : 1,
                in_kernel ? optional(saved[4]) : std::nullopt, likelihood, reduction, kl_reduction, made),
        made);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 5>& saved,
                                        const Wants<4>& wants) const {
    const Choice c = choose(likelihood, reduction, kl_reduction);
    const Tensor g_recon = sum(g[0], g[1]), g_kl = sum(weighted(g[0], saved[4]), g[2]);
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

 private:
  // The part of loss's gradient that reaches the KL.
  Tensor weighted(const Tensor& g, const Tensor& beta_tensor) const {
    if (!g.defined()) return g;
    return beta_tensor.defined() ? (g * beta_tensor).to(g.scalar_type()) : g * beta;
  }

  bool lifted_ = false;
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
    VaeLoss op;
    op.beta = beta;
    op.likelihood = likelihood;
    op.reduction = reduction;
    op.kl_reduction = kl_reduction.value_or(reduction);
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
      "_vae_loss_gradients(Tensor? g_recon, Tensor? g_kl, Tensor recon_x, Tensor x, Tensor mu, Tensor logvar, "
      "float beta, "
      "Tensor? beta_tensor, str likelihood, str reduction, str? kl_reduction, bool[4] wants) -> Tensor[]",
      kPure);
  m.def(
      "vae_loss_for_compiler(Tensor recon_x, Tensor x, Tensor mu, Tensor logvar, Tensor? beta, str likelihood, "
      "str reduction, str? kl_reduction) -> (Tensor recon, Tensor kl)",
      for_compiler, kPure);
  implement(m, "vae_loss", vae_loss);
  implement_elsewhere(m, "vae_loss", elsewhere);
  implement_inner(m, "_vae_loss_with_gradients", with_gradients);
  implement_inner(m, "_vae_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("vae_loss", autograd); }

}  // namespace fastvae
