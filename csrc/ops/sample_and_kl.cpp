// sample_and_kl: reparameterize and kl_normal of the same posterior in one pass over the latents, forward and backward.
#include "latent.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "fastvae.sample_and_kl";

// ---- On the devices, and Meta.

std::tuple<Tensor, Tensor, Tensor> draw_and_sample(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                                   const OptionalTensor& logvar_p, c10::string_view reduction,
                                                   std::optional<at::Generator> generator, int64_t /*draw*/) {
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, false);
  check_noise(kOp, mu, std::nullopt, generator);
  call.want_z = call.want_kl = true;
  const Draw drawn = draw(mu, generator);
  call.noise = drawn.noise;
  const LatentResult r = latent_pass(call);
  return {r.z, r.kl, drawn.state};
}

std::tuple<Tensor, Tensor> sample_and_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                         const OptionalTensor& logvar_p, c10::string_view reduction,
                                         const OptionalTensor& eps, std::optional<at::Generator> generator) {
  if (!eps.has_value()) {
    const auto [z, kl, state] = draw_and_sample(mu, logvar, mu_p, logvar_p, reduction, generator, 0);
    return {z, kl};
  }
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, false);
  check_noise(kOp, mu, eps, generator);
  call.want_z = call.want_kl = true;
  call.eps = *eps;
  const LatentResult r = latent_pass(call);
  return {r.z, r.kl};
}

std::tuple<Tensor, Tensor> for_compiler(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                        const OptionalTensor& logvar_p, c10::string_view reduction,
                                        const OptionalTensor& eps, std::optional<at::Generator> generator) {
  kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, false);  // checks
  check_noise(kOp, mu, eps, generator);
  // Widened once, so that the two gradients of a 16-bit tensor are added before they are rounded.
  const auto wide = [](const OptionalTensor& t) { return t.has_value() ? optional(widened(*t)) : t; };
  const Tensor m = widened(mu), l = widened(logvar);
  const auto z_type = c10::promoteTypes(mu.scalar_type(), logvar.scalar_type());
  return {reparameterize_for_compiler(m, l, eps, generator).to(z_type),
          kl_normal_for_compiler(m, l, wide(mu_p), wide(logvar_p), reduction)};
}

// Gradients of mu, logvar, mu_p, logvar_p and eps, from those of z and kl, one of which may be absent.
std::vector<Tensor> gradients(const OptionalTensor& dz, const OptionalTensor& dkl, const Tensor& mu,
                              const Tensor& logvar, const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                              c10::string_view reduction, const OptionalTensor& eps, const OptionalTensor& state,
                              std::array<bool, 5> wants) {
  LatentCall call = kl_call(kOp, mu, logvar, mu_p, logvar_p, reduction, false);
  call.dz = or_undefined(dz);
  call.upstream = or_undefined(dkl);
  if (!call.upstream.defined()) call.reduction.reset();
  call.eps = or_undefined(eps);
  if (state.has_value()) call.noise = remembered(*state);
  call.wants = wants;
  const LatentResult r = latent_pass(call);
  return defined_only({r.d_mu, r.d_logvar, r.d_mu_p, r.d_logvar_p, r.d_eps});
}

// ---- Autograd.

struct SampleAndKl {
  static constexpr const char* kName = "FastvaeSampleAndKlBackward";
  static constexpr int kInputs = 5, kSaved = 6;  // mu, logvar, mu_p, logvar_p, eps; and the state
  std::string reduction;
  auto options() const { return std::tie(reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, 6>& saved, const Wants<5>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_sample_and_kl_gradients");
    const Tensor &dz = g[0], &dkl = g[1];
    Wants<5> made = wants;  // by the kernel
    made[0] = wants[0] && dkl.defined();
    made[2] = wants[2] && dkl.defined();
    made[3] = wants[3] && dkl.defined();
    made[4] = wants[4] && dz.defined();
    variable_list all(5);
    if (made != Wants<5>{}) {
      all = placed(op.call(optional(dz), optional(dkl), saved[0], saved[1], optional(saved[2]), optional(saved[3]),
                           reduction, optional(saved[4]), optional(saved[5]), made),
                   made);
    }
    if (wants[0] && !made[0]) all[0] = dz;
    return all;
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, 6>& saved,
                                        const Wants<5>& wants) const {
    variable_list all(5);
    const auto add = [&](int i, const Tensor& t) {
      if (t.defined()) all[i] = all[i].defined() ? all[i] + t : t;
    };
    if (g[0].defined()) {
      const auto d = sample_differentiable_backward(g[0], saved[1], saved[4], saved[5], {wants[0], wants[1], wants[4]});
      add(0, d[0]);
      add(1, d[1]);
      add(4, d[2]);
    }
    if (g[1].defined()) {
      const auto d = kl_differentiable_backward(g[1], saved[0], saved[1], saved[2], saved[3],
                                                parse_reduction(kOp, reduction, "reduction", false),
                                                {wants[0], wants[1], wants[2], wants[3]});
      for (int i = 0; i < 4; ++i) add(i, d[i]);
    }
    return all;
  }
};

std::tuple<Tensor, Tensor> autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                    const OptionalTensor& logvar_p, c10::string_view reduction,
                                    const OptionalTensor& eps, std::optional<at::Generator> generator) {
  static const auto value_op = find_op<decltype(sample_and_kl)>("fastvae::sample_and_kl");
  static const auto draw_op = find_op<decltype(draw_and_sample)>("fastvae::_sample_and_kl_draw");
  const std::array<Tensor, 5> inputs{mu, logvar, or_undefined(mu_p), or_undefined(logvar_p), or_undefined(eps)};
  if (!eps.has_value() && std::any_of(inputs.begin(), inputs.end(), is_transformed)) {
    check_noise(kOp, mu, std::nullopt, generator);
    return autograd(mu, logvar, mu_p, logvar_p, reduction, noise_for_transform(mu, generator), std::nullopt);
  }
  const bool differentiate = torch::autograd::compute_requires_grad(mu, logvar, mu_p, logvar_p, eps);
  Tensor z, kl, state;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (!eps.has_value() && (differentiate || is_traced(mu))) {
      std::tie(z, kl, state) = draw_op.call(mu, logvar, mu_p, logvar_p, reduction, generator, next_draw(mu));
    } else {
      std::tie(z, kl) = value_op.call(mu, logvar, mu_p, logvar_p, reduction, eps, generator);
    }
  }
  if (differentiate) {
    const auto node =
        record(SampleAndKl{std::string(reduction)}, inputs, {mu, logvar, inputs[2], inputs[3], inputs[4], state});
    torch::autograd::set_history(z, node);
    torch::autograd::set_history(kl, node);
  }
  set_tangent(z, sample_tangent({mu, logvar, inputs[4]}));
  set_tangent(kl, kl_tangent({mu, logvar, inputs[2], inputs[3]}, parse_reduction(kOp, reduction, "reduction", false)));
  return {z, kl};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def(
      "sample_and_kl(Tensor mu, Tensor logvar, Tensor? mu_p=None, Tensor? logvar_p=None, str "
      "reduction=\"batchmean\", "
      "Tensor? eps=None, Generator? generator=None) -> (Tensor z, Tensor kl)",
      kRandom);
  m.def(
      "_sample_and_kl_draw(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, str reduction, Generator? "
      "generator, int draw) -> "
      "(Tensor z, Tensor kl, Tensor state)",
      kRandom);
  m.def(
      "_sample_and_kl_gradients(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, str "
      "reduction, "
      "Tensor? eps, Tensor? state, bool[5] wants) -> Tensor[]",
      kPure);
  m.def(
      "sample_and_kl_for_compiler(Tensor mu, Tensor logvar, Tensor? mu_p=None, Tensor? logvar_p=None, str "
      "reduction=\"batchmean\", Tensor? eps=None, Generator? generator=None) -> (Tensor z, Tensor kl)",
      for_compiler, kRandom);
  implement(m, "sample_and_kl", sample_and_kl);
  implement_elsewhere(m, "sample_and_kl", for_compiler);
  implement_inner(m, "_sample_and_kl_draw", draw_and_sample);
  implement_inner(m, "_sample_and_kl_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("sample_and_kl", autograd); }

}  // namespace fastvae
