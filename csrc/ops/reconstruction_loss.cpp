// reconstruction_loss: the negative log-likelihood of the elements, reduced.
// With a scalar reduction the forward pass of training reads recon_x and x once and writes their gradients (3 N); the
// others recompute them in the backward pass.
#include "reconstruction_loss.h"

#include <ATen/ops/ones.h>

namespace fastvae {

void check_reconstruction(const char* op, const Tensor& recon_x, const Tensor& x) {
  check_tensor(op, "recon_x", recon_x);
  check_batch(op, "recon_x", recon_x);
  check_tensor(op, "x", x);
  check_same_device(op, "recon_x", recon_x, "x", x);
  check_same_shape(op, "recon_x", recon_x, "x", x);
  check_same_arithmetic(op, "recon_x", recon_x, "x", x);
}

ReconstructionPass prepare(const ReconstructionCall& call) {
  const Tensor &recon_x = call.recon_x, &x = call.x;
  ReconstructionPass pass;
  ReconstructionResult& r = pass.result;
  if (call.want_value) r.value = empty_result(call.reduction, recon_x);
  r.d_recon_x = empty_gradient(call.wants[0], recon_x);
  r.d_x = empty_gradient(call.wants[1], x);
  if (recon_x.is_meta()) return pass;
  const auto order = memory_order({recon_x, x}, call.reduction == Reduction::sample);
  ReconstructionArgs& args = pass.args;
  args.scale = 1 / divisor_value(call.reduction, recon_x);
  args.may_be_kept = is_scalar(call.reduction);
  args.upstream = upstream_view(call.upstream, call.reduction, recon_x, order);
  args.float64 = recon_x.scalar_type() == at::kDouble;
  args.likelihood = call.likelihood;
  args.recon_x = view_of(recon_x, order);
  args.x = view_of(x, order);
  args.d_recon_x = view_of(r.d_recon_x, order);
  args.d_x = view_of(r.d_x, order);
  if (call.want_value && call.reduction == Reduction::none) args.value = view_of(r.value, order);
  pass.numel = recon_x.numel();
  pass.sums = sums_of(r.value, call.reduction, recon_x);
  pass.upstream = call.upstream;
  return pass;
}

ReconstructionResult reconstruction_pass(const ReconstructionCall& call) {
  const ReconstructionPass pass = prepare(call);
  run_reconstruction(call.recon_x, pass.args, pass.numel, pass.sums);
  return pass.result;
}

variable_list reconstruction_differentiable_backward(const Tensor& g, const Tensor& recon_x, const Tensor& x,
                                                     Likelihood likelihood, Reduction reduction, Wants<2> wants) {
  const Tensor d = spread(g, reduction, recon_x) * differentiable_d_recon_x(likelihood, recon_x, x);
  return {wants[0] ? d.to(recon_x.scalar_type()) : Tensor(), wants[1] ? (-d).to(x.scalar_type()) : Tensor()};
}

// In aten ops, which Inductor fuses with the decoder's last layer and its backward pass: an opaque op reads recon_x and
// writes its gradient through memory once more.
Tensor reconstruction_for_compiler(const Tensor& recon_x, const Tensor& x, Likelihood likelihood, Reduction reduction) {
  return reduced(differentiable_value(likelihood, recon_x, x), reduction);
}

Tensor reconstruction_tangent(const std::array<Tensor, 2>& inputs, Likelihood likelihood, Reduction reduction) {
  const auto tangents = tangents_of(inputs);
  const Wants<2> given = defined(tangents);
  if (given == Wants<2>{}) return {};
  const Tensor recon_x = wide_primal(inputs[0]);
  const auto d = reconstruction_differentiable_backward(at::ones({}, recon_x.options()), recon_x,
                                                        wide_primal(inputs[1]), likelihood, Reduction::none, given);
  return reduced(along(d, tangents), reduction);
}

namespace {

constexpr const char* kOp = "fastvae.reconstruction_loss";

struct Choice {
  Likelihood likelihood;
  Reduction reduction;
};
Choice choose(c10::string_view likelihood, c10::string_view reduction) {
  return {parse_likelihood(kOp, likelihood), parse_reduction(kOp, reduction, "reduction", true)};
}

// ---- On the devices, and Meta.

Tensor reconstruction_loss(const Tensor& recon_x, const Tensor& x, c10::string_view likelihood,
                           c10::string_view reduction) {
  const Choice choice = choose(likelihood, reduction);
  check_reconstruction(kOp, recon_x, x);
  return reconstruction_pass({recon_x, x, choice.likelihood, choice.reduction, true}).value;
}

Tensor for_compiler(const Tensor& recon_x, const Tensor& x, c10::string_view likelihood, c10::string_view reduction) {
  const Choice choice = choose(likelihood, reduction);
  check_reconstruction(kOp, recon_x, x);
  return reconstruction_for_compiler(recon_x, x, choice.likelihood, choice.reduction);
}

std::tuple<Tensor, std::vector<Tensor>> with_gradients(const Tensor& recon_x, const Tensor& x,
                                                       c10::string_view likelihood, c10::string_view reduction,
                                                       std::array<bool, 2> wants) {
  const Choice choice = choose(likelihood, reduction);
  check_reconstruction(kOp, recon_x, x);
  const auto r = reconstruction_pass({recon_x, x, choice.likelihood, choice.reduction, true, wants});
  return {r.value, defined_only({r.d_recon_x, r.d_x})};
}

std::vector<Tensor> gradients(const Tensor& g, const Tensor& recon_x, const Tensor& x, c10::string_view likelihood,
                              c10::string_view reduction, std::array<bool, 2> wants) {
  const Choice choice = choose(likelihood, reduction);
  const auto r = reconstruction_pass({recon_x, x, choice.likelihood, choice.reduction, false, wants, g});
  return defined_only({r.d_recon_x, r.d_x});
}

// ---- Autograd.

struct ReconstructionLoss {
  static constexpr const char* kName = "FastvaeReconstructionLossBackward";
  static constexpr int kInputs = 2, kSaved = 2;
  std::string likelihood, reduction;
  auto options() const { return std::tie(likelihood, reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, 2>& saved, const Wants<2>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_reconstruction_loss_gradients");
    return placed(op.call(g[0], saved[0], saved[1], likelihood, reduction, wants), wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 2>& saved,
                                        const Wants<2>& wants) const {
    const Choice choice = choose(likelihood, reduction);
    return reconstruction_differentiable_backward(g[0], saved[0], saved[1], choice.likelihood, choice.reduction, wants);
  }
};

Tensor autograd(const Tensor& recon_x, const Tensor& x, c10::string_view likelihood, c10::string_view reduction) {
  static const auto value_op = find_op<decltype(reconstruction_loss)>("fastvae::reconstruction_loss");
  static const auto with_gradients_op =
      find_op<decltype(with_gradients)>("fastvae::_reconstruction_loss_with_gradients");
  const bool differentiate = torch::autograd::compute_requires_grad(recon_x, x);
  Tensor value;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && is_scalar(choose(likelihood, reduction).reduction) && may_keep_gradients({recon_x, x})) {
      const auto wants = wanted<2>({recon_x, x});
      std::vector<Tensor> made;
      std::tie(value, made) = with_gradients_op.call(recon_x, x, likelihood, reduction, wants);
      kept = placed(made, wants);
    } else {
      value = value_op.call(recon_x, x, likelihood, reduction);
    }
  }
  if (differentiate) {
    const ReconstructionLoss op{std::string(likelihood), std::string(reduction)};
    torch::autograd::set_history(value, record(op, {recon_x, x}, {recon_x, x}, std::move(kept)));
  }
  const Choice choice = choose(likelihood, reduction);
  set_tangent(value, reconstruction_tangent({recon_x, x}, choice.likelihood, choice.reduction));
  return value;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("reconstruction_loss(Tensor recon_x, Tensor x, str likelihood=\"mse\", str reduction=\"batchmean\") -> Tensor",
        kPure);
  m.def(
      "_reconstruction_loss_with_gradients(Tensor recon_x, Tensor x, str likelihood, str reduction, bool[2] wants) -> "
      "(Tensor, Tensor[])",
      kPure);
  m.def(
      "_reconstruction_loss_gradients(Tensor g, Tensor recon_x, Tensor x, str likelihood, str reduction, bool[2] "
      "wants) -> Tensor[]",
      kPure);
  m.def("reconstruction_loss_for_compiler(Tensor recon_x, Tensor x, str likelihood, str reduction) -> Tensor",
        for_compiler, kPure);
  implement(m, "reconstruction_loss", reconstruction_loss);
  implement_elsewhere(m, "reconstruction_loss", for_compiler);
  implement_inner(m, "_reconstruction_loss_with_gradients", with_gradients);
  implement_inner(m, "_reconstruction_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("reconstruction_loss", autograd); }

}  // namespace fastvae
