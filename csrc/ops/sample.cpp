// reparameterize: z = mu + sigma * eps. The noise is drawn in registers and never stored; the backward pass draws it
// again from its (seed, offset). sample_and_kl: the same and kl_normal of that posterior, in one pass forward and one
// backward. Both share one implementation; reparameterize has no formula.
#include <ATen/ops/empty.h>

#include "loss.h"
#include "noise.h"

namespace fastvae {
namespace {

const char* op_of(int64_t loss) { return loss < 0 ? "fastvae.reparameterize" : "fastvae.sample_and_kl"; }

// ---- On the devices, and Meta.

PassCall call_of(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                 const OptionalTensor& eps, const std::optional<at::Generator>& generator, int64_t loss,
                 Numbers numbers) {
  PassCall call;
  call.in = {mu, logvar, or_undefined(mu_p), or_undefined(logvar_p)};
  call.loss = loss_of(loss, numbers);
  if (loss < 0) {
    check_posterior(op_of(loss), mu, logvar);
    check_numbers(op_of(loss), call.loss, 0);
  } else {
    check_loss(op_of(loss), call.loss, call.in, {});
  }
  check_noise(op_of(loss), mu, eps, generator);
  call.eps = or_undefined(eps);
  call.want_z = true;
  call.want_value = loss >= 0;
  return call;
}

// z, the KL divergence (empty without a formula) and the state of the noise.
std::tuple<Tensor, Tensor, Tensor> draw_sample(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                               const OptionalTensor& logvar_p, std::optional<at::Generator> generator,
                                               int64_t loss, int64_t /*draw*/, Numbers numbers) {
  PassCall call = call_of(mu, logvar, mu_p, logvar_p, std::nullopt, generator, loss, numbers);
  const Draw drawn = draw(mu, generator);
  call.noise = drawn.noise;
  const Pass pass = run(call);
  return {pass.z, loss < 0 ? at::empty({0}, drawn.state.options()) : pass.value, drawn.state};
}

std::tuple<Tensor, Tensor> sample_and_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                         const OptionalTensor& logvar_p, const OptionalTensor& eps,
                                         std::optional<at::Generator> generator, int64_t loss, Numbers numbers) {
  PassCall call = call_of(mu, logvar, mu_p, logvar_p, eps, generator, loss, numbers);
  Draw drawn;
  if (!eps.has_value()) drawn = draw(mu, generator);
  call.noise = drawn.noise;
  const Pass pass = run(call);
  return {pass.z, pass.value};
}

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                      std::optional<at::Generator> generator, int64_t loss, Numbers numbers) {
  return std::get<0>(sample_and_kl(mu, logvar, std::nullopt, std::nullopt, eps, generator, loss, numbers));
}

// Gradients of mu, logvar, mu_p, logvar_p and eps, from those of z and kl, one of which may be absent.
std::vector<Tensor> gradients(const OptionalTensor& dz, const OptionalTensor& dkl, const OptionalTensor& mu,
                              const Tensor& logvar, const OptionalTensor& mu_p, const OptionalTensor& logvar_p,
                              const OptionalTensor& eps, const OptionalTensor& state, int64_t loss,
                              std::array<bool, 5> wants, Numbers numbers) {
  PassCall call;
  call.in = {or_undefined(mu), logvar, or_undefined(mu_p), or_undefined(logvar_p)};
  call.loss = loss_of(loss, numbers);
  if (!dkl.has_value()) call.loss.formula = -1;
  call.upstream = or_undefined(dkl);
  call.dz = or_undefined(dz);
  call.eps = or_undefined(eps);
  if (state.has_value()) call.noise = remembered(*state);
  std::copy(wants.begin(), wants.begin() + 4, call.wants.begin());
  call.want_d_eps = wants[4];
  const Pass pass = run(call);
  return defined_only({pass.d[0], pass.d[1], pass.d[2], pass.d[3], pass.d_eps});
}

// For ONNX, and on devices without kernels.
std::tuple<Tensor, Tensor> sample_and_kl_composed(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                                  const OptionalTensor& logvar_p, const OptionalTensor& eps,
                                                  std::optional<at::Generator> generator, int64_t loss,
                                                  Numbers numbers) {
  const PassCall call = call_of(mu, logvar, mu_p, logvar_p, eps, generator, loss, numbers);
  // Widened once, so that the two gradients of a 16-bit tensor are added before they are rounded.
  Inputs wide;
  for (int i = 0; i < kMaxInputs; ++i) wide[i] = call.in[i].defined() ? widened(call.in[i]) : Tensor();
  const Tensor z = composed_sample(call.loss, wide[0], wide[1], eps, generator)
                       .to(c10::promoteTypes(mu.scalar_type(), logvar.scalar_type()));
  return {z, loss < 0 ? Tensor() : composed_loss(call.loss, wide, {}, {})};
}
Tensor reparameterize_composed(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                               std::optional<at::Generator> generator, int64_t loss, Numbers numbers) {
  return std::get<0>(sample_and_kl_composed(mu, logvar, std::nullopt, std::nullopt, eps, generator, loss, numbers));
}

// ---- Autograd.

struct Sample {
  static constexpr const char* kName = "FastvaeSampleBackward";
  static constexpr int kInputs = 5, kSaved = 6;  // mu, logvar, mu_p, logvar_p, eps; and the state
  Loss loss;
  auto options() const { return std::make_tuple(loss.code, loss.numbers); }

  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_sample_gradients");
    const Tensor dz = g[0], dkl = g.size() > 1 ? g[1] : Tensor();
    Wants<kInputs> made = wants;  // by the kernel; without dkl the gradient of mu is dz
    made[0] = wants[0] && dkl.defined();
    made[2] = wants[2] && dkl.defined();
    made[3] = wants[3] && dkl.defined();
    made[4] = wants[4] && dz.defined();
    variable_list all(kInputs);
    if (made != Wants<kInputs>{}) {
      all = placed(op.call(optional(dz), optional(dkl), optional(saved[0]), saved[1], optional(saved[2]),
                           optional(saved[3]), optional(saved[4]), optional(saved[5]), loss.code, made, loss.numbers),
                   made);
    }
    if (wants[0] && !made[0]) all[0] = dz;
    return all;
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    variable_list all(kInputs);
    const auto add = [&](int i, const Tensor& t) { all[i] = sum(all[i], t); };
    if (g[0].defined()) {
      const auto d =
          composed_sample_gradients(loss, g[0], saved[0], saved[1], saved[4], saved[5], {wants[0], wants[1], wants[4]});
      add(0, d[0]);
      add(1, d[1]);
      add(4, d[2]);
    }
    if (g.size() > 1 && g[1].defined()) {
      const auto d = composed_gradients(g[1], loss, {saved[0], saved[1], saved[2], saved[3]}, {}, {},
                                        {wants[0], wants[1], wants[2], wants[3]});
      for (int i = 0; i < 4; ++i) add(i, d[i]);
    }
    return all;
  }
};

// z and kl, which is undefined without a formula. `value_op` computes both if no state must be kept.
template <class Op>
std::tuple<Tensor, Tensor> sample_with_history(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                               const OptionalTensor& logvar_p, OptionalTensor eps,
                                               std::optional<at::Generator> generator, int64_t loss, Numbers numbers,
                                               Op value_op) {
  static const auto draw_op = find_op<decltype(draw_sample)>("fastvae::_draw_sample");
  if (!eps.has_value() && (is_transformed(mu) || is_transformed(logvar) || is_transformed(or_undefined(mu_p)) ||
                           is_transformed(or_undefined(logvar_p)))) {
    check_noise(op_of(loss), mu, std::nullopt, generator);
    eps = noise_for_transform(mu, generator);
    generator.reset();
  }
  const std::array<Tensor, 5> inputs{mu, logvar, or_undefined(mu_p), or_undefined(logvar_p), or_undefined(eps)};
  const bool differentiate = torch::autograd::compute_requires_grad(mu, logvar, mu_p, logvar_p, eps);
  Tensor z, kl, state;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (!eps.has_value() && (differentiate || is_traced(mu))) {
      std::tie(z, kl, state) = draw_op.call(mu, logvar, mu_p, logvar_p, generator, loss, next_draw(mu), numbers);
      if (loss < 0) kl = Tensor();
    } else {
      std::tie(z, kl) = value_op(eps, generator);
    }
  }
  const Loss of_kl = loss_of(loss, numbers);
  if (differentiate) {
    // Without a formula mu is not needed in the backward pass.
    const auto node =
        record(Sample{of_kl}, inputs, {loss < 0 ? Tensor() : mu, logvar, inputs[2], inputs[3], inputs[4], state});
    torch::autograd::set_history(z, node);
    if (kl.defined()) torch::autograd::set_history(kl, node);
  }
  set_tangent(z, composed_sample_tangent(of_kl, mu, logvar, inputs[4]));
  if (kl.defined()) set_tangent(kl, composed_tangent(of_kl, {mu, logvar, inputs[2], inputs[3]}, {}));
  return {z, kl};
}

std::tuple<Tensor, Tensor> sample_and_kl_autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& mu_p,
                                                  const OptionalTensor& logvar_p, const OptionalTensor& eps,
                                                  std::optional<at::Generator> generator, int64_t loss,
                                                  Numbers numbers) {
  static const auto op = find_op<decltype(sample_and_kl)>("fastvae::sample_and_kl");
  return sample_with_history(mu, logvar, mu_p, logvar_p, eps, generator, loss, numbers,
                             [&](const OptionalTensor& e, const std::optional<at::Generator>& from) {
                               return op.call(mu, logvar, mu_p, logvar_p, e, from, loss, numbers);
                             });
}

Tensor reparameterize_autograd(const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                               std::optional<at::Generator> generator, int64_t loss, Numbers numbers) {
  static const auto op = find_op<decltype(reparameterize)>("fastvae::reparameterize");
  return std::get<0>(sample_with_history(mu, logvar, std::nullopt, std::nullopt, eps, generator, loss, numbers,
                                         [&](const OptionalTensor& e, const std::optional<at::Generator>& from) {
                                           return std::make_tuple(op.call(mu, logvar, e, from, loss, numbers),
                                                                  Tensor());
                                         }));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def(
      "reparameterize(Tensor mu, Tensor logvar, Tensor? eps=None, Generator? generator=None, int loss=-1, "
      "float[]? numbers=None) -> Tensor",
      kRandom);
  m.def(
      "sample_and_kl(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, Tensor? eps, Generator? generator, "
      "int loss, float[]? numbers=None) -> (Tensor z, Tensor kl)",
      kRandom);
  m.def(
      "_draw_sample(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, Generator? generator, int loss, "
      "int draw, float[]? numbers=None) -> (Tensor z, Tensor kl, Tensor state)",
      kRandom);
  m.def(
      "_sample_gradients(Tensor? dz, Tensor? dkl, Tensor? mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, "
      "Tensor? eps, Tensor? state, int loss, bool[5] wants, float[]? numbers=None) -> Tensor[]",
      kPure);
  m.def(
      "reparameterize_composed(Tensor mu, Tensor logvar, Tensor? eps=None, Generator? generator=None, int loss=-1, "
      "float[]? numbers=None) -> Tensor",
      reparameterize_composed, kRandom);
  m.def(
      "sample_and_kl_composed(Tensor mu, Tensor logvar, Tensor? mu_p, Tensor? logvar_p, Tensor? eps, Generator? "
      "generator, int loss, float[]? numbers=None) -> (Tensor z, Tensor kl)",
      sample_and_kl_composed, kRandom);
  implement(m, "reparameterize", reparameterize);
  implement_elsewhere(m, "reparameterize", reparameterize_composed);
  implement(m, "sample_and_kl", sample_and_kl);
  implement_elsewhere(m, "sample_and_kl", sample_and_kl_composed);
  implement_inner(m, "_draw_sample", draw_sample);
  implement_inner(m, "_sample_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("reparameterize", reparameterize_autograd);
  m.impl("sample_and_kl", sample_and_kl_autograd);
}

}  // namespace fastvae
