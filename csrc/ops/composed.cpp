// Inlined calls of torch are no faster, and take twice the code.
#define FASTVAE_INLINE inline

#include "composed.h"

#include <ATen/ops/ones_like.h>

#include "../formulas/element.h"
#include "../formulas/list.h"
#include "../formulas/sample.h"
#include "elements.h"
#include "noise.h"

namespace fastvae {
namespace {

struct Composed {
  Tensor value;
  Inputs d;
};

template <class F, class S>
Composed compose_as(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers) {
  using T = Elements<S>;
  constexpr int n = kInputsOf<F>;
  constexpr auto dtype = c10::CppTypeToScalarType<S>::value;
  const auto number = [&](int64_t i) {
    return numbers.defined() ? T(numbers.select(0, i).to(dtype)) : T(static_cast<S>(loss.numbers[i]));
  };
  Extras<T> extras;
  extras.transform = static_cast<int>(loss.transform);
  if (numbers.defined() || !loss.numbers.empty()) {
    extras.has_constant = extras.has_scale = extras.has_floor = extras.has_clamp = true;
    extras.constant = number(0);
    extras.x_scale = number(1);
    extras.floor = number(2);
    extras.low = number(3);
    extras.high = number(4);
    for (int i = 0; i < F::kNumbers; ++i) extras.number[i] = number(kOwnNumbers + i);
  }
  T x[n], w;
  const Tensor absent = weight.defined() ? weight == 0 : Tensor();
  for (int i = 0; i < n; ++i) {
    x[i] = T(widened(in[i], dtype));
    // 0.5 is in the domain of every formula, so no derivative is 0 times NaN.
    if (absent.defined()) x[i] = select(absent, T(S(0.5)), x[i]);
  }
  if (weight.defined()) w = T(widened(weight, dtype));
  const Terms<T, n> terms =
      element<F>(x, extras, weight.defined() ? &w : static_cast<const T*>(nullptr), static_cast<const T*>(nullptr));
  Composed composed;
  composed.value = terms.value.tensor;
  for (int i = 0; i < n; ++i) {
    const T& d = terms.d[i];
    composed.d[i] = d.tensor.defined() ? d.tensor : at::ones_like(composed.value) * d.constant;
  }
  return composed;
}

template <class F>
Composed compose_by(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers) {
  return in[0].scalar_type() == at::kDouble ? compose_as<F, double>(loss, in, weight, numbers)
                                            : compose_as<F, float>(loss, in, weight, numbers);
}

Composed compose(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers) {
#define FASTVAE_COMPOSE(F) compose_by<F>,
  static constexpr Composed (*kByFormula[])(const Loss&, const Inputs&, const Tensor&,
                                            const Tensor&) = {FASTVAE_FORMULAS(FASTVAE_COMPOSE)};
#undef FASTVAE_COMPOSE
  return kByFormula[loss.formula](loss, in, weight, numbers);
}

// The primal value of an input, widened so that no derivative is rounded to 16 bits.
Tensor wide_primal(const Tensor& t) { return t.defined() ? widened(t._fw_primal(/*level=*/0)) : t; }

// The sum of derivative times tangent over the inputs with a tangent; undefined if there are none.
template <class List, size_t N>
Tensor sum_of_products(const List& derivatives, const std::array<Tensor, N>& tangents) {
  Tensor total;
  for (size_t i = 0; i < N; ++i) {
    if (tangents[i].defined()) total = sum(total, derivatives[i] * widened(tangents[i]));
  }
  return total;
}

}  // namespace

namespace {

// Gives a composed loss the gradients of the formula. Autograd's own gradients of the value's ops would lose their
// digits near the prior, and would be those of either side at a kink.
struct ComposedLoss {
  static constexpr const char* kName = "FastvaeComposedLossBackward";
  static constexpr int kInputs = kMaxInputs, kSaved = kMaxInputs + 2;  // and weight, numbers
  Loss loss;
  auto options() const { return std::make_tuple(loss.code); }

  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    return composed_gradients(g[0], loss, {saved[0], saved[1], saved[2], saved[3], saved[4]}, saved[5], saved[6],
                              wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    return backward(g, saved, wants);
  }
};

}  // namespace

Tensor composed_loss(const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers) {
  const auto value = [&] { return reduced(compose(loss, in, weight, numbers).value, loss.reduction, weight); };
  if (std::any_of(in.begin(), in.end(), is_batched)) return value();  // vmap must see the aten ops
  Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = value();
  }
  if (torch::autograd::compute_requires_grad(in[0], in[1], in[2], in[3], in[4])) {
    torch::autograd::set_history(result,
                                 record(ComposedLoss{loss}, in, {in[0], in[1], in[2], in[3], in[4], weight, numbers}));
  }
  set_tangent(result, composed_tangent(loss, in, weight));
  return result;
}

variable_list composed_gradients(const Tensor& g, const Loss& loss, const Inputs& in, const Tensor& weight,
                                 const Tensor& numbers, const Wants<kMaxInputs>& wants) {
  const Composed composed = compose(loss, in, weight, numbers);
  const Tensor factor = spread(g, loss.reduction, in[0], weight);
  variable_list gradients(kMaxInputs);
  for (int i = 0; i < kMaxInputs; ++i) {
    if (!wants[i]) continue;
    const Tensor d = factor * composed.d[i];
    const bool broadcast = d.sym_sizes() != in[i].sym_sizes();
    gradients[i] = (broadcast ? d.sum_to_size_symint(in[i].sym_sizes()) : d).to(in[i].scalar_type());
  }
  return gradients;
}

Tensor composed_tangent(const Loss& loss, const Inputs& in, const Tensor& weight) {
  const Inputs tangents = tangents_of(in);
  if (!any_defined(tangents)) return {};
  Inputs primals;
  for (int i = 0; i < kMaxInputs; ++i) primals[i] = wide_primal(in[i]);
  return reduced(sum_of_products(compose(loss, primals, weight, {}).d, tangents), loss.reduction, weight);
}

namespace {

// sigma, and its derivative by `given`.
template <class S>
std::pair<Tensor, Tensor> sigma_as(const Loss& loss, const Tensor& given) {
  using T = Elements<S>;
  Extras<T> extras;
  extras.transform = static_cast<int>(loss.transform);
  if (!loss.numbers.empty()) {
    extras.has_clamp = true;
    extras.low = T(static_cast<S>(loss.numbers[3]));
    extras.high = T(static_cast<S>(loss.numbers[4]));
  }
  const Spread<T> s = extras.spread(T(given), /*is_first=*/true);
  return {s.sigma.tensor, s.d_sigma.tensor.defined() ? s.d_sigma.tensor : at::ones_like(given)};
}
std::pair<Tensor, Tensor> sigma_of(const Loss& loss, const Tensor& logvar) {
  const Tensor given = widened(logvar);
  return given.scalar_type() == at::kDouble ? sigma_as<double>(loss, given) : sigma_as<float>(loss, given);
}

}  // namespace

Tensor composed_sample(const Loss& loss, const Tensor& mu, const Tensor& logvar, const OptionalTensor& eps,
                       const std::optional<at::Generator>& generator) {
  const Tensor m = widened(mu);
  const Tensor noise = eps.has_value() ? eps->to(m.scalar_type()) : torch_noise(mu, generator);
  return (m + sigma_of(loss, logvar).first * noise).to(c10::promoteTypes(mu.scalar_type(), logvar.scalar_type()));
}

variable_list composed_sample_gradients(const Loss& loss, const Tensor& dz, const Tensor& mu, const Tensor& logvar,
                                        const Tensor& eps, const Tensor& state, const Wants<3>& wants) {
  variable_list g(3);
  if (wants[0]) g[0] = mu.defined() ? dz.to(mu.scalar_type()) : dz;
  if (!wants[1] && !wants[2]) return g;
  const auto [sigma, d_sigma] = sigma_of(loss, logvar);
  if (wants[1]) {
    const Tensor noise = eps.defined() ? eps.to(sigma.scalar_type()) : noise_of(logvar, state);
    g[1] = (widened(dz) * (d_sigma * noise)).to(logvar.scalar_type());
  }
  if (wants[2]) g[2] = (widened(dz) * sigma).to(eps.scalar_type());
  return g;
}

Tensor composed_sample_tangent(const Loss& loss, const Tensor& mu, const Tensor& logvar, const Tensor& eps) {
  const std::array<Tensor, 3> tangents = tangents_of(std::array<Tensor, 3>{mu, logvar, eps});
  if (!any_defined(tangents)) return {};
  const Tensor wide = wide_primal(logvar);
  const Wants<3> given{tangents[0].defined(), tangents[1].defined(), tangents[2].defined()};
  return sum_of_products(composed_sample_gradients(loss, at::ones_like(wide), {}, wide, wide_primal(eps), {}, given),
                         tangents);
}

}  // namespace fastvae
