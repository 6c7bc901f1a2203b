// elementwise_loss is the loss of one formula; vae_loss = recon + beta * kl is two losses under one autograd node. With
// scalar reductions the forward pass of training reads the inputs once and also writes their gradients. If backward()
// starts from that loss, it has nothing left to compute. Other backward passes recompute from the saved inputs.
#include "loss.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include "../formulas/list.h"
#include "views.h"

namespace fastvae {
namespace {

struct Description {
  const char *name, *op;
  const Argument* inputs;
  int count, numbers;
  bool counts, sparse;
};
#define FASTVAE_DESCRIPTION(F) {F::kName, F::kOp, F::kInputs, kInputsOf<F>, F::kNumbers, F::kCounts, F::kSparse},
constexpr Description kFormulas[] = {FASTVAE_FORMULAS(FASTVAE_DESCRIPTION)};
#undef FASTVAE_DESCRIPTION

const Description& described(int64_t formula) {
  TORCH_CHECK_VALUE(formula >= 0 && formula < static_cast<int64_t>(std::size(kFormulas)),
                    "fastvae: there is no formula number ", formula);
  return kFormulas[formula];
}

std::vector<std::string> formulas() {
  std::vector<std::string> names;
  for (const Description& f : kFormulas) names.push_back(f.name);
  return names;
}

}  // namespace

void check_numbers(const char* op, const Loss& loss, int64_t own, const Tensor& numbers) {
  const int64_t given = numbers.defined() ? numbers.size(0) : static_cast<int64_t>(loss.numbers.size());
  TORCH_CHECK_VALUE(given == kOwnNumbers + own || (given == 0 && own == 0), op, ": the formula has ", own,
                    " numbers of its own, but got ", given, " in all");
}

void check_loss(const char* op, const Loss& loss, const Inputs& in, const Tensor& weight, const Tensor& numbers) {
  const Description& f = described(loss.formula);
  const Tensor& main = in[0];
  const char* main_name = f.inputs[0].name;
  const bool scaled = numbers.defined() || (!loss.numbers.empty() && loss.numbers[1] != 1);
  if (f.inputs[1].role == kMain) {
    check_posterior(op, main, in[1]);
    if (f.count > 2) check_prior(op, main, in[2], in[3]);
  } else {
    check_tensor(op, main_name, main);
    check_batch(op, main_name, main);
  }
  for (int i = 1; i < f.count; ++i) {
    const auto& [name, role, is_logvar] = f.inputs[i];
    const Tensor& t = in[i];
    if (role == kMain) continue;
    if (role == kData) {
      check_tensor(op, name, t, /*may_be_integer=*/true);
      TORCH_CHECK_VALUE(t.scalar_type() != at::kByte || f.counts || scaled, op, ": ", name,
                        " is uint8: pixels in 0..255 need a scale, as in SquaredError(x_scale=1 / 255) of "
                        "fastvae.likelihoods; if its numbers are meant as they are, give ",
                        name, ".short()");
      TORCH_CHECK_VALUE(!f.sparse || !t.requires_grad(), op, ": ", name, " must not require a gradient, as ", f.name,
                        " is of counts and makes none; give ", name, ".detach()");
    } else {
      TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a tensor, but got None");
      check_dtype(op, name, t);
    }
    check_same_device(op, main_name, main, name, t);
    if (role == kData) {
      check_same_shape(op, main_name, main, name, t);
    } else {
      check_broadcasts(op, name, t, main_name, main);
    }
    if (!is_supported_integer(t.scalar_type())) check_same_arithmetic(op, main_name, main, name, t);
  }
  if (weight.defined()) check_weight(op, weight, main_name, main);
  TORCH_CHECK_VALUE(loss.reduction != Reduction::channel || main.dim() > 1, op,
                    ": reduction=\"channel\" needs dimension 1, but ", main_name, "'s shape is ", main.sym_sizes());
  TORCH_CHECK_VALUE(!is_sample(loss.reduction) || batch_dims(loss.reduction) <= main.dim(), op, ": batch_dims is ",
                    batch_dims(loss.reduction), ", but ", main_name, "'s shape is ", main.sym_sizes());
  check_numbers(op, loss, f.numbers, numbers);
}

namespace {

// One term, or a reconstruction and a KL divergence.
struct Objective {
  PassCall main, kl;

  bool is_pair() const { return kl.loss.formula >= 0; }
  const char* op() const {
    if (is_pair()) return "fastvae.vae_loss";
    return described(main.loss.formula).op;
  }
  // A formula with five inputs never comes with a KL: its fifth input takes the place of mu.
  std::array<Tensor, 6> inputs() const {
    return {main.in[0], main.in[1], main.in[2], main.in[3], is_pair() ? kl.in[0] : main.in[4], kl.in[1]};
  }
  void want(const Wants<6>& wants) {
    std::copy_n(wants.begin(), is_pair() ? 4 : 5, main.wants.begin());
    if (is_pair()) std::copy_n(wants.begin() + 4, 2, kl.wants.begin());
  }
};

// The arguments that the ops share, the rarely used ones last. `numbers` is a list. For a compiler it is a tensor, so
// that the compiler does not make constants of it.
#define FASTVAE_SCHEMA(numbers)                                                                                        \
  "Tensor a, Tensor b, Tensor? mu, Tensor? logvar, int loss, int kl, float beta=1.0, Tensor? c=None, Tensor? d=None, " \
  "Tensor? weight=None, " numbers " numbers=None, " numbers " kl_numbers=None, Tensor? beta_tensor=None"
#define FASTVAE_PARAMETERS(Numbers)                                                                                   \
  const Tensor &a, const Tensor &b, const OptionalTensor &mu, const OptionalTensor &logvar, int64_t loss, int64_t kl, \
      double beta, const OptionalTensor &c, const OptionalTensor &d, const OptionalTensor &weight, Numbers numbers,   \
      Numbers kl_numbers, const OptionalTensor &beta_tensor
#define FASTVAE_ARGUMENTS a, b, mu, logvar, loss, kl, beta, c, d, weight, numbers, kl_numbers, beta_tensor
// The same for one term.
#define FASTVAE_SCHEMA_OF_ONE(numbers)                                                          \
  "Tensor a, Tensor b, int loss, Tensor? c=None, Tensor? d=None, Tensor? weight=None, " numbers \
  " numbers=None, "                                                                             \
  "Tensor? e=None"
#define FASTVAE_PARAMETERS_OF_ONE(Numbers)                                                          \
  const Tensor &a, const Tensor &b, int64_t loss, const OptionalTensor &c, const OptionalTensor &d, \
      const OptionalTensor &weight, Numbers numbers, const OptionalTensor &e
#define FASTVAE_ARGUMENTS_OF_ONE a, b, loss, c, d, weight, numbers, e
#define FASTVAE_WITHOUT_KL \
  a, b, e, {}, loss, -1, 1, c, d, weight, numbers, {}, {}

Objective objective_of(FASTVAE_PARAMETERS(Numbers)) {
  Objective o;
  o.main.in = {a, b, or_undefined(c), or_undefined(d)};
  o.main.weight = or_undefined(weight);
  o.main.loss = loss_of(loss, numbers);
  o.kl.loss = loss_of(kl, kl_numbers);
  (o.is_pair() ? o.kl.in[0] : o.main.in[4]) = or_undefined(mu);
  o.kl.in[1] = or_undefined(logvar);
  o.kl.factor = beta;
  o.kl.factor_at = or_undefined(beta_tensor);
  return o;
}

void check(const Objective& o, const Tensor& numbers = {}) {
  const char* op = o.op();
  check_loss(op, o.main.loss, o.main.in, o.main.weight, numbers);
  if (!o.is_pair()) return;
  const Tensor &recon_x = o.main.in[0], &mu = o.kl.in[0], &beta = o.kl.factor_at;
  check_loss(op, o.kl.loss, o.kl.in, {});
  check_same_device(op, "recon_x", recon_x, "mu", mu);
  TORCH_CHECK_VALUE(recon_x.sym_size(0) == mu.sym_size(0), op,
                    ": recon_x and mu must have the same batch size, but got shapes ", recon_x.sym_sizes(), " and ",
                    mu.sym_sizes());
  if (!beta.defined()) return;
  TORCH_CHECK_VALUE(beta.dim() == 0, op, ": beta must be a float or a 0-dim tensor, but its shape is ",
                    beta.sym_sizes());
  check_dtype(op, "beta", beta);
  check_same_device(op, "beta", beta, "mu", mu);
}

void check_beta(const OptionalTensor& beta) {
  TORCH_CHECK_VALUE(!beta.has_value() || !beta->requires_grad(),
                    "fastvae.vae_loss: beta must not require a gradient, as none is computed for it; give "
                    "beta.detach(), or, to learn it, add the terms yourself: recon + beta * kl");
}

// ---- On the devices, and Meta.

std::vector<Tensor> listed(const Pass& main, const Pass& kl) {
  return defined_only({main.d[0], main.d[1], main.d[2], main.d[3], main.d[4], kl.d[0], kl.d[1]});
}

// The value, or (loss, recon, kl); and the gradients of the value or of loss.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> with_gradients(std::array<bool, 6> wants,
                                                                    FASTVAE_PARAMETERS(Numbers)) {
  Objective o = objective_of(FASTVAE_ARGUMENTS);
  check(o);
  o.want(wants);
  o.main.want_value = o.kl.want_value = true;
  if (!o.is_pair()) {
    const Pass pass = run(o.main);
    return {{pass.value}, listed(pass, {})};
  }
  const Pass main = prepare(o.main), of_kl = prepare(o.kl);
  const Tensor sum = at::empty_like(main.value.scalar_type() == at::kDouble ? main.value : of_kl.value);
  Combination combination;
  if (!sum.is_meta()) combination.loss = sum.data_ptr();
  combination.float64 = sum.scalar_type() == at::kDouble;
  combination.beta = beta;
  combination.weight = of_kl.args.scale_at;
  run_objective(a, main.args, of_kl.args, combination);
  return {{sum, main.value, of_kl.value}, listed(main, of_kl)};
}

// The inputs' gradients from those of the two terms, g and g_kl. g_kl is still to be multiplied by beta.
std::vector<Tensor> gradients(std::array<bool, 6> wants, const OptionalTensor& g, const OptionalTensor& g_kl,
                              FASTVAE_PARAMETERS(Numbers)) {
  Objective o = objective_of(FASTVAE_ARGUMENTS);
  o.want(wants);
  o.main.upstream = or_undefined(g);
  o.kl.upstream = or_undefined(g_kl);
  constexpr Wants<kMaxInputs> kNone = {};
  const Pass main = o.main.wants != kNone ? prepare(o.main) : Pass(),
             of_kl = o.kl.wants != kNone ? prepare(o.kl) : Pass();
  if (o.is_pair()) {
    run_objective(a, main.args, of_kl.args, {});
  } else {
    run_pass(a, main.args);
  }
  return listed(main, of_kl);
}

Tensor elementwise_loss(FASTVAE_PARAMETERS_OF_ONE(Numbers)) {
  return std::get<0>(with_gradients({}, FASTVAE_WITHOUT_KL))[0];
}
std::tuple<Tensor, Tensor, Tensor> vae_loss(FASTVAE_PARAMETERS(Numbers)) {
  const auto values = std::get<0>(with_gradients({}, FASTVAE_ARGUMENTS));
  return {values[0], values[1], values[2]};
}

// ---- In aten ops: for compilers and ONNX, and on devices without kernels.

// For a compiler: the two terms. The caller adds them in Python, where a compiler sees what beta is.
std::tuple<Tensor, Tensor> vae_loss_composed(FASTVAE_PARAMETERS(const OptionalTensor&)) {
  const Objective o = objective_of(a, b, mu, logvar, loss, kl, beta, c, d, weight, {}, {}, beta_tensor);
  check(o, or_undefined(numbers));
  check_beta(beta_tensor);
  return {composed_loss(o.main.loss, o.main.in, o.main.weight, or_undefined(numbers)),
          o.is_pair() ? composed_loss(o.kl.loss, o.kl.in, {}, or_undefined(kl_numbers)) : Tensor()};
}
Tensor elementwise_loss_composed(FASTVAE_PARAMETERS_OF_ONE(const OptionalTensor&)) {
  return std::get<0>(vae_loss_composed(FASTVAE_WITHOUT_KL));
}

// beta is converted to the KL's dtype, since MPS has no float64.
std::tuple<Tensor, Tensor, Tensor> vae_loss_elsewhere(FASTVAE_PARAMETERS(Numbers)) {
  const Objective o = objective_of(FASTVAE_ARGUMENTS);
  check(o);
  check_beta(beta_tensor);
  const Tensor main = composed_loss(o.main.loss, o.main.in, o.main.weight, {});
  if (!o.is_pair()) return {main, Tensor(), Tensor()};
  const Tensor of_kl = composed_loss(o.kl.loss, o.kl.in, {}, {});
  const Tensor weighted = beta_tensor.has_value() ? of_kl * beta_tensor->to(of_kl.scalar_type()) : of_kl * beta;
  return {main + weighted, main, of_kl};
}
Tensor elementwise_loss_elsewhere(FASTVAE_PARAMETERS_OF_ONE(Numbers)) {
  return std::get<0>(vae_loss_elsewhere(FASTVAE_WITHOUT_KL));
}

// ---- Autograd.

struct LossNode {
  static constexpr const char* kName = "FastvaeLossBackward";
  // Saved: the inputs of both terms, the weight, beta if it is a tensor, and the lifted numbers.
  static constexpr int kInputs = 6, kSaved = kInputs + 4, kWeight = 6, kBeta = 7, kNumbers = 8, kKlNumbers = 9;
  using Saved = std::array<Tensor, kSaved>;
  Loss main, kl;
  double beta;
  bool lifted = false;
  auto options() const { return std::make_tuple(main.code, kl.code); }

  void lift_numbers(std::array<torch::autograd::SavedVariable, kSaved>& saved) {
    if (kl.formula >= 0 && !saved[kBeta].unpack().defined()) {
      saved[kBeta] = torch::autograd::SavedVariable(at::scalar_tensor(beta, at::kDouble), /*is_output=*/false);
      lifted = true;
    }
    if (!main.numbers.empty()) lift(saved[kNumbers], main.numbers);
    if (!kl.numbers.empty()) lift(saved[kKlNumbers], kl.numbers);
  }

  variable_list backward(const variable_list& g, const Saved& saved, const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_loss_gradients");
    if (saved[kNumbers].defined() || saved[kKlNumbers].defined()) return differentiable_backward(g, saved, wants);
    // If only loss has a gradient, the kernel multiplies by beta, for the same roundings as in the forward pass.
    const bool in_kernel = g.size() == 1 || (g[0].defined() && !g[2].defined() && !lifted);
    const auto [g_main, g_kl] = in_kernel && g.size() > 1 ? std::pair(sum(g[0], g[1]), g[0]) : upstream(g, saved);
    Wants<kInputs> made = wants;
    for (int i = 0; i < kInputs; ++i) made[i] = wants[i] && (i < 4 || kl.formula < 0 ? g_main : g_kl).defined();
    return placed(
        op.call(made, optional(g_main), optional(g_kl), saved[0], saved[1], optional(saved[4]), optional(saved[5]),
                main.code, kl.code, in_kernel ? beta : 1, optional(saved[2]), optional(saved[3]),
                optional(saved[kWeight]), main.numbers, kl.numbers, in_kernel ? optional(saved[kBeta]) : std::nullopt),
        made);
  }
  variable_list differentiable_backward(const variable_list& g, const Saved& saved, const Wants<kInputs>& wants) const {
    const auto [g_main, g_kl] = upstream(g, saved);
    variable_list all(kInputs);
    if (g_main.defined()) {
      const auto d = composed_gradients(g_main, main, inputs_of(saved), saved[kWeight], saved[kNumbers],
                                        {wants[0], wants[1], wants[2], wants[3], kl.formula < 0 && wants[4]});
      std::copy_n(d.begin(), kl.formula < 0 ? 5 : 4, all.begin());
    }
    if (g_kl.defined()) {
      const auto d = composed_gradients(g_kl, kl, {saved[4], saved[5]}, {}, saved[kKlNumbers], {wants[4], wants[5]});
      std::copy_n(d.begin(), 2, all.begin() + 4);
    }
    return all;
  }

 private:
  Inputs inputs_of(const Saved& saved) const {
    return {saved[0], saved[1], saved[2], saved[3], kl.formula < 0 ? saved[4] : Tensor()};
  }
  // The gradients of the two terms, from the gradient of the value or from those of (loss, recon, kl).
  std::pair<Tensor, Tensor> upstream(const variable_list& g, const Saved& saved) const {
    if (g.size() == 1) return {g[0], Tensor()};
    Tensor weighted = g[0];
    if (g[0].defined()) weighted = saved[kBeta].defined() ? (g[0] * saved[kBeta]).to(g[0].scalar_type()) : g[0] * beta;
    return {sum(g[0], g[1]), sum(weighted, g[2])};
  }
};

// `value` runs the op below autograd. It is called if the forward pass makes no gradients.
template <class Value>
std::vector<Tensor> with_history(FASTVAE_PARAMETERS(Numbers), Value value) {
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_loss_with_gradients");
  const Objective o = objective_of(FASTVAE_ARGUMENTS);
  const auto inputs = o.inputs();
  const bool differentiate = torch::autograd::compute_requires_grad(a, b, c, d, mu, logvar);
  std::vector<Tensor> values;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && is_scalar(o.main.loss.reduction) && may_keep_gradients(inputs)) {
      const auto wants = wanted(inputs);
      std::vector<Tensor> made;
      std::tie(values, made) = with_gradients_op.call(wants, FASTVAE_ARGUMENTS);
      kept = placed(made, wants);
    } else {
      values = value();
    }
  }
  if (differentiate) {
    const auto node = record(LossNode{o.main.loss, o.kl.loss, beta}, inputs,
                             {inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], o.main.weight,
                              o.kl.factor_at, Tensor(), Tensor()},
                             std::move(kept));
    for (const Tensor& v : values) torch::autograd::set_history(v, node);
  }
  const Tensor d_main = composed_tangent(o.main.loss, o.main.in, o.main.weight);
  if (!o.is_pair()) {
    set_tangent(values[0], d_main);
    return values;
  }
  const Tensor d_kl = composed_tangent(o.kl.loss, o.kl.in, {});
  const Tensor weighted = !d_kl.defined() ? d_kl : beta_tensor.has_value() ? d_kl * *beta_tensor : d_kl * beta;
  set_tangent(values[0], sum(d_main, weighted));
  set_tangent(values[1], d_main);
  set_tangent(values[2], d_kl);
  return values;
}

Tensor elementwise_loss_autograd(FASTVAE_PARAMETERS_OF_ONE(Numbers)) {
  static const auto op = find_op<decltype(elementwise_loss)>("fastvae::elementwise_loss");
  return with_history(FASTVAE_WITHOUT_KL, [&] { return std::vector<Tensor>{op.call(FASTVAE_ARGUMENTS_OF_ONE)}; })[0];
}
std::tuple<Tensor, Tensor, Tensor> vae_loss_autograd(FASTVAE_PARAMETERS(Numbers)) {
  static const auto op = find_op<decltype(vae_loss)>("fastvae::vae_loss");
  check_beta(beta_tensor);
  const auto values = with_history(FASTVAE_ARGUMENTS, [&] {
    const auto [sum, recon, of_kl] = op.call(FASTVAE_ARGUMENTS);
    return std::vector<Tensor>{sum, recon, of_kl};
  });
  return {values[0], values[1], values[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("formulas() -> str[]", formulas);
  m.def("elementwise_loss(" FASTVAE_SCHEMA_OF_ONE("float[]?") ") -> Tensor", kPure);
  m.def("elementwise_loss_composed(" FASTVAE_SCHEMA_OF_ONE("Tensor?") ") -> Tensor", elementwise_loss_composed, kPure);
  m.def("vae_loss(" FASTVAE_SCHEMA("float[]?") ") -> (Tensor loss, Tensor recon, Tensor kl)", kPure);
  m.def("vae_loss_composed(" FASTVAE_SCHEMA("Tensor?") ") -> (Tensor recon, Tensor kl)", vae_loss_composed, kPure);
  m.def("_loss_with_gradients(bool[6] wants, " FASTVAE_SCHEMA("float[]?") ") -> (Tensor[] values, Tensor[] gradients)",
        kPure);
  m.def("_loss_gradients(bool[6] wants, Tensor? g, Tensor? g_kl, " FASTVAE_SCHEMA("float[]?") ") -> Tensor[]", kPure);
  implement(m, "elementwise_loss", elementwise_loss);
  implement_elsewhere(m, "elementwise_loss", elementwise_loss_elsewhere);
  implement(m, "vae_loss", vae_loss);
  implement_elsewhere(m, "vae_loss", vae_loss_elsewhere);
  implement_inner(m, "_loss_with_gradients", with_gradients);
  implement_inner(m, "_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("elementwise_loss", elementwise_loss_autograd);
  m.impl("vae_loss", vae_loss_autograd);
}

}  // namespace fastvae
