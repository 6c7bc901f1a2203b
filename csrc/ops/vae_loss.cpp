// vae_loss: loss = recon + beta * kl, two elementwise losses under one autograd node.
// With scalar reductions the forward pass of training reads its inputs once and writes the gradients of `loss` (3 N + 4
// M); when `loss` is what backward() starts from, nothing is left to compute there. All else recomputes from the saved
// inputs.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include "elementwise_loss.h"
#include "views.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "fastvae.vae_loss";

// What decides it beside the tensors; KL(posterior || N(0, 1)) is a formula as well.
struct Choice {
  Loss recon, kl;
};

Choice choice_of(int64_t formula, std::optional<at::ArrayRef<double>> numbers, int64_t activation, int64_t reduction,
                 int64_t kl_formula, std::optional<at::ArrayRef<double>> kl_numbers, int64_t kl_reduction) {
  return {loss_of(formula, numbers, activation, reduction), loss_of(kl_formula, kl_numbers, 0, kl_reduction)};
}

void check(const Choice& choice, const Inputs& recon, const Tensor& weight, const Inputs& kl, const Tensor& beta,
           const Tensor& numbers = {}) {
  check_loss(kOp, choice.recon, recon, weight, numbers);
  check_loss(kOp, choice.kl, kl, {});
  check_same_device(kOp, "recon_x", recon[0], "mu", kl[0]);
  TORCH_CHECK_VALUE(recon[0].sym_size(0) == kl[0].sym_size(0), kOp,
                    ": recon_x and mu must have the same batch size, but got shapes ", recon[0].sym_sizes(), " and ",
                    kl[0].sym_sizes());
  if (!beta.defined()) return;
  TORCH_CHECK_VALUE(beta.dim() == 0, kOp, ": beta must be a float or a 0-dim tensor, but its shape is ",
                    beta.sym_sizes());
  check_dtype(kOp, "beta", beta);
  check_same_device(kOp, "beta", beta, "mu", kl[0]);
}

void check_beta(const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(
      !beta.has_value() || !beta->requires_grad(), kOp,
      ": beta must not require a gradient, as none is computed for it; give beta.detach(), or, to learn it, "
      "add the terms yourself: recon + beta * kl");
}

// ---- On the devices, and Meta.

PassCall recon_call(const Choice& choice, const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter,
                    const OptionalTensor& weight, const Wants<5>& wants) {
  PassCall call;
  call.in = {recon_x, x, or_undefined(parameter), Tensor()};
  call.weight = or_undefined(weight);
  call.loss = choice.recon;
  call.wants = {wants[0], wants[1], wants[2]};
  return call;
}

PassCall kl_call(const Choice& choice, const Tensor& mu, const Tensor& logvar, double beta,
                 const OptionalTensor& beta_tensor, const Wants<5>& wants) {
  PassCall call;
  call.in = {mu, logvar, Tensor(), Tensor()};
  call.loss = choice.kl;
  call.factor = beta;
  call.factor_at = or_undefined(beta_tensor);
  call.wants = {wants[3], wants[4]};
  return call;
}

std::vector<Tensor> listed(const Pass& recon, const Pass& kl) {
  return defined_only({recon.d[0], recon.d[1], recon.d[2], kl.d[0], kl.d[1]});
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> with_gradients(
    const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter, const OptionalTensor& weight,
    const Tensor& mu, const Tensor& logvar, double beta, const OptionalTensor& beta_tensor, int64_t formula,
    std::optional<at::ArrayRef<double>> numbers, int64_t activation, int64_t reduction, int64_t kl_formula,
    std::optional<at::ArrayRef<double>> kl_numbers, int64_t kl_reduction, std::array<bool, 5> wants) {
  const Choice choice = choice_of(formula, numbers, activation, reduction, kl_formula, kl_numbers, kl_reduction);
  PassCall of_recon = recon_call(choice, recon_x, x, parameter, weight, wants);
  PassCall of_kl = kl_call(choice, mu, logvar, beta, beta_tensor, wants);
  check(choice, of_recon.in, of_recon.weight, of_kl.in, of_kl.factor_at);
  of_recon.want_value = of_kl.want_value = true;
  const Pass recon = prepare(of_recon), kl = prepare(of_kl);
  const Tensor loss = at::empty_like(recon.value.scalar_type() == at::kDouble ? recon.value : kl.value);
  Combination combination;
  if (!loss.is_meta()) combination.loss = loss.data_ptr();
  combination.float64 = loss.scalar_type() == at::kDouble;
  combination.beta = beta;
  combination.weight = kl.args.scale_at;
  run_objective(recon_x, recon.args, kl.args, combination);
  return {loss, recon.value, kl.value, listed(recon, kl)};
}

std::tuple<Tensor, Tensor, Tensor> vae_loss(const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter,
                                            const OptionalTensor& weight, const Tensor& mu, const Tensor& logvar,
                                            double beta, const OptionalTensor& beta_tensor, int64_t formula,
                                            std::optional<at::ArrayRef<double>> numbers, int64_t activation,
                                            int64_t reduction, int64_t kl_formula,
                                            std::optional<at::ArrayRef<double>> kl_numbers, int64_t kl_reduction) {
  auto [loss, recon, kl, none] =
      with_gradients(recon_x, x, parameter, weight, mu, logvar, beta, beta_tensor, formula, numbers, activation,
                     reduction, kl_formula, kl_numbers, kl_reduction, {});
  return {loss, recon, kl};
}

// For a compiler: the two terms. Their weighted sum is the caller's, in Python, where a compiler sees what beta is.
std::tuple<Tensor, Tensor> composed(const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter,
                                    const OptionalTensor& weight, const Tensor& mu, const Tensor& logvar,
                                    const OptionalTensor& beta, int64_t formula, const OptionalTensor& numbers,
                                    int64_t activation, int64_t reduction, int64_t kl_formula,
                                    const OptionalTensor& kl_numbers, int64_t kl_reduction) {
  const Choice choice = choice_of(formula, {}, activation, reduction, kl_formula, {}, kl_reduction);
  const Inputs recon{recon_x, x, or_undefined(parameter), Tensor()}, kl{mu, logvar, Tensor(), Tensor()};
  check(choice, recon, or_undefined(weight), kl, or_undefined(beta), or_undefined(numbers));
  check_beta(beta);
  return {composed_loss(choice.recon, recon, or_undefined(weight), or_undefined(numbers)),
          composed_loss(choice.kl, kl, {}, or_undefined(kl_numbers))};
}

// On devices without kernels. Not in float64, which MPS does not have.
std::tuple<Tensor, Tensor, Tensor> elsewhere(const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter,
                                             const OptionalTensor& weight, const Tensor& mu, const Tensor& logvar,
                                             double beta, const OptionalTensor& beta_tensor, int64_t formula,
                                             std::optional<at::ArrayRef<double>> numbers, int64_t activation,
                                             int64_t reduction, int64_t kl_formula,
                                             std::optional<at::ArrayRef<double>> kl_numbers, int64_t kl_reduction) {
  const Choice choice = choice_of(formula, numbers, activation, reduction, kl_formula, kl_numbers, kl_reduction);
  const PassCall of_recon = recon_call(choice, recon_x, x, parameter, weight, {});
  const PassCall of_kl = kl_call(choice, mu, logvar, beta, beta_tensor, {});
  check(choice, of_recon.in, of_recon.weight, of_kl.in, of_kl.factor_at);
  check_beta(beta_tensor);
  const Tensor recon = composed_loss(choice.recon, of_recon.in, of_recon.weight, {});
  const Tensor kl = composed_loss(choice.kl, of_kl.in, {}, {});
  return {recon + (beta_tensor.has_value() ? kl * beta_tensor->to(kl.scalar_type()) : kl * beta), recon, kl};
}

// Gradients of recon_x, x and the parameter from that of recon, and of mu and logvar from that of kl, times beta.
std::vector<Tensor> gradients(const OptionalTensor& g_recon, const OptionalTensor& g_kl, const Tensor& recon_x,
                              const Tensor& x, const OptionalTensor& parameter, const OptionalTensor& weight,
                              const Tensor& mu, const Tensor& logvar, double beta, const OptionalTensor& beta_tensor,
                              int64_t formula, std::optional<at::ArrayRef<double>> numbers, int64_t activation,
                              int64_t reduction, int64_t kl_formula, std::optional<at::ArrayRef<double>> kl_numbers,
                              int64_t kl_reduction, std::array<bool, 5> wants) {
  const Choice choice = choice_of(formula, numbers, activation, reduction, kl_formula, kl_numbers, kl_reduction);
  Pass recon, kl;
  if (wants[0] || wants[1] || wants[2]) {
    PassCall call = recon_call(choice, recon_x, x, parameter, weight, wants);
    call.upstream = *g_recon;
    recon = prepare(call);
  }
  if (wants[3] || wants[4]) {
    PassCall call = kl_call(choice, mu, logvar, beta, beta_tensor, wants);
    call.upstream = *g_kl;
    kl = prepare(call);
  }
  run_objective(recon_x, recon.args, kl.args, {});
  return listed(recon, kl);
}

// ---- Autograd.

Tensor sum(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a + b : (a.defined() ? a : b); }

struct VaeLoss {
  static constexpr const char* kName = "FastvaeVaeLossBackward";
  // recon_x, x, parameter, mu, logvar; and weight, beta, if a tensor, and the lifted numbers of both terms
  static constexpr int kInputs = 5, kSaved = 9;
  using Saved = std::array<Tensor, kSaved>;
  Choice choice;
  double beta;
  bool lifted = false;
  auto options() const { return std::tuple_cat(choice.recon.integers(), choice.kl.integers()); }

  void lift_numbers(std::array<torch::autograd::SavedVariable, kSaved>& saved) {
    if (!saved[6].unpack().defined()) {
      saved[6] = torch::autograd::SavedVariable(at::scalar_tensor(beta, at::kDouble), /*is_output=*/false);
      lifted = true;
    }
    if (!choice.recon.numbers.empty()) lift(saved[7], choice.recon.numbers);
    if (!choice.kl.numbers.empty()) lift(saved[8], choice.kl.numbers);
  }

  variable_list backward(const variable_list& g, const Saved& saved, const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_vae_loss_gradients");
    if (saved[7].defined() || saved[8].defined()) return differentiable_backward(g, saved, wants);
    const Tensor g_recon = sum(g[0], g[1]);
    Tensor g_kl = g[0];
    // Alone, the gradient of loss meets the same roundings in the kernel as in the forward pass: beta goes there.
    const bool in_kernel = g[0].defined() && !g[2].defined() && !lifted;
    if (!in_kernel) g_kl = sum(weighted(g[0], saved[6]), g[2]);
    Wants<kInputs> made = wants;
    for (int i = 0; i < kInputs; ++i) made[i] = wants[i] && (i < 3 ? g_recon : g_kl).defined();
    return placed(
        op.call(optional(g_recon), optional(g_kl), saved[0], saved[1], optional(saved[2]), optional(saved[5]), saved[3],
                saved[4], in_kernel ? beta : 1, in_kernel ? optional(saved[6]) : std::nullopt, choice.recon.formula,
                choice.recon.numbers, choice.recon.activation, static_cast<int64_t>(choice.recon.reduction),
                choice.kl.formula, choice.kl.numbers, static_cast<int64_t>(choice.kl.reduction), made),
        made);
  }
  variable_list differentiable_backward(const variable_list& g, const Saved& saved, const Wants<kInputs>& wants) const {
    const Tensor g_recon = sum(g[0], g[1]), g_kl = sum(weighted(g[0], saved[6]), g[2]);
    variable_list all(kInputs);
    if (g_recon.defined()) {
      const auto d = composed_gradients(g_recon, choice.recon, {saved[0], saved[1], saved[2], Tensor()}, saved[5],
                                        saved[7], {wants[0], wants[1], wants[2]});
      std::copy_n(d.begin(), 3, all.begin());
    }
    if (g_kl.defined()) {
      const auto d = composed_gradients(g_kl, choice.kl, {saved[3], saved[4], Tensor(), Tensor()}, {}, saved[8],
                                        {wants[3], wants[4]});
      std::copy_n(d.begin(), 2, all.begin() + 3);
    }
    return all;
  }

 private:
  // The part of loss's gradient that reaches the KL.
  Tensor weighted(const Tensor& g, const Tensor& beta_tensor) const {
    if (!g.defined()) return g;
    return beta_tensor.defined() ? (g * beta_tensor).to(g.scalar_type()) : g * beta;
  }
};

std::tuple<Tensor, Tensor, Tensor> autograd(const Tensor& recon_x, const Tensor& x, const OptionalTensor& parameter,
                                            const OptionalTensor& weight, const Tensor& mu, const Tensor& logvar,
                                            double beta, const OptionalTensor& beta_tensor, int64_t formula,
                                            std::optional<at::ArrayRef<double>> numbers, int64_t activation,
                                            int64_t reduction, int64_t kl_formula,
                                            std::optional<at::ArrayRef<double>> kl_numbers, int64_t kl_reduction) {
  static const auto value_op = find_op<decltype(vae_loss)>("fastvae::vae_loss");
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_vae_loss_with_gradients");
  const std::array<Tensor, 5> inputs{recon_x, x, or_undefined(parameter), mu, logvar};
  check_beta(beta_tensor);
  const bool differentiate = torch::autograd::compute_requires_grad(recon_x, x, parameter, mu, logvar);
  Tensor loss, recon, kl;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && static_cast<Reduction>(reduction) != Reduction::sample && may_keep_gradients(inputs)) {
      const auto wants = wanted(inputs);
      std::vector<Tensor> made;
      std::tie(loss, recon, kl, made) =
          with_gradients_op.call(recon_x, x, parameter, weight, mu, logvar, beta, beta_tensor, formula, numbers,
                                 activation, reduction, kl_formula, kl_numbers, kl_reduction, wants);
      kept = placed(made, wants);
    } else {
      std::tie(loss, recon, kl) = value_op.call(recon_x, x, parameter, weight, mu, logvar, beta, beta_tensor, formula,
                                                numbers, activation, reduction, kl_formula, kl_numbers, kl_reduction);
    }
  }
  const Choice choice = choice_of(formula, numbers, activation, reduction, kl_formula, kl_numbers, kl_reduction);
  const Tensor w = or_undefined(weight);
  if (differentiate) {
    const auto node =
        record(VaeLoss{choice, beta}, inputs,
               {recon_x, x, inputs[2], mu, logvar, w, or_undefined(beta_tensor), Tensor(), Tensor()}, std::move(kept));
    torch::autograd::set_history(loss, node);
    torch::autograd::set_history(recon, node);
    torch::autograd::set_history(kl, node);
  }
  const Tensor d_recon = composed_tangent(choice.recon, {recon_x, x, inputs[2], Tensor()}, w);
  const Tensor d_kl = composed_tangent(choice.kl, {mu, logvar, Tensor(), Tensor()}, {});
  set_tangent(recon, d_recon);
  set_tangent(kl, d_kl);
  if (d_kl.defined()) {
    set_tangent(loss, sum(d_recon, beta_tensor.has_value() ? d_kl * *beta_tensor : d_kl * beta));
  } else {
    set_tangent(loss, d_recon);
  }
  return {loss, recon, kl};
}

#define FASTVAE_TENSORS "Tensor recon_x, Tensor x, Tensor? parameter, Tensor? weight, Tensor mu, Tensor logvar, "
#define FASTVAE_OPTIONS                                                                                             \
  "float beta, Tensor? beta_tensor, int formula, float[]? numbers, int activation, int reduction, int kl_formula, " \
  "float[]? kl_numbers, int kl_reduction"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("vae_loss(" FASTVAE_TENSORS FASTVAE_OPTIONS ") -> (Tensor loss, Tensor recon, Tensor kl)", kPure);
  m.def("_vae_loss_with_gradients(" FASTVAE_TENSORS FASTVAE_OPTIONS
        ", bool[5] wants) -> (Tensor loss, Tensor recon, Tensor kl, Tensor[] gradients)",
        kPure);
  m.def("_vae_loss_gradients(Tensor? g_recon, Tensor? g_kl, " FASTVAE_TENSORS FASTVAE_OPTIONS
        ", bool[5] wants) -> Tensor[]",
        kPure);
  m.def("vae_loss_composed(" FASTVAE_TENSORS
        "Tensor? beta, int formula, Tensor? numbers, int activation, int reduction, int kl_formula, "
        "Tensor? kl_numbers, int kl_reduction) -> (Tensor recon, Tensor kl)",
        composed, kPure);
  implement(m, "vae_loss", vae_loss);
  implement_elsewhere(m, "vae_loss", elsewhere);
  implement_inner(m, "_vae_loss_with_gradients", with_gradients);
  implement_inner(m, "_vae_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("vae_loss", autograd); }

}  // namespace fastvae
