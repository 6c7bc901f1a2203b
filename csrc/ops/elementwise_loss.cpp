// With a scalar reduction the forward pass of training reads the inputs once and writes their gradients; the other
// reductions recompute them in the backward pass.
#include "elementwise_loss.h"

#include "../formulas/list.h"

namespace fastvae {
namespace {

struct Description {
  const char* name;
  const Argument* inputs;
  int count, numbers;
  bool counts;
};
#define FASTVAE_DESCRIPTION(F) {F::kName, F::kInputs, kInputsOf<F>, F::kNumbers, F::kCounts},
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
    const auto& [name, role] = f.inputs[i];
    const Tensor& t = in[i];
    if (role == kMain) continue;
    if (role == kData) {
      check_tensor(op, name, t, /*may_be_integer=*/true);
      TORCH_CHECK_VALUE(t.scalar_type() != at::kByte || f.counts || scaled, op, ": ", name,
                        " is uint8: pixels in 0..255 need a scale, as in SquaredError(x_scale=1 / 255) of "
                        "fastvae.likelihoods; if its numbers are meant as they are, give ",
                        name, ".short()");
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
  const int64_t given = numbers.defined() ? numbers.size(0) : static_cast<int64_t>(loss.numbers.size());
  TORCH_CHECK_VALUE(given == kOwnNumbers + f.numbers || (given == 0 && f.numbers == 0), op, ": ", f.name, " has ",
                    f.numbers, " numbers of its own, but got ", given);
}

namespace {

const char* op_of(int64_t formula) {
  return described(formula).inputs[1].role == kMain ? "fastvae.kl_normal" : "fastvae.reconstruction_loss";
}

// ---- On the devices, and Meta.

PassCall call_of(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                 const OptionalTensor& weight, int64_t formula, std::optional<at::ArrayRef<double>> numbers,
                 int64_t activation, int64_t reduction) {
  PassCall call;
  call.in = {a, b, or_undefined(c), or_undefined(d)};
  call.weight = or_undefined(weight);
  call.loss = loss_of(formula, numbers, activation, reduction);
  return call;
}

std::tuple<Tensor, std::vector<Tensor>> with_gradients(const Tensor& a, const Tensor& b, const OptionalTensor& c,
                                                       const OptionalTensor& d, const OptionalTensor& weight,
                                                       int64_t formula, std::optional<at::ArrayRef<double>> numbers,
                                                       int64_t activation, int64_t reduction,
                                                       std::array<bool, 4> wants) {
  PassCall call = call_of(a, b, c, d, weight, formula, numbers, activation, reduction);
  check_loss(op_of(formula), call.loss, call.in, call.weight);
  call.want_value = true;
  call.wants = wants;
  const Pass pass = run(call);
  return {pass.value, defined_only(pass.d)};
}

Tensor elementwise_loss(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                        const OptionalTensor& weight, int64_t formula, std::optional<at::ArrayRef<double>> numbers,
                        int64_t activation, int64_t reduction) {
  return std::get<0>(with_gradients(a, b, c, d, weight, formula, numbers, activation, reduction, {}));
}

std::vector<Tensor> gradients(const Tensor& g, const Tensor& a, const Tensor& b, const OptionalTensor& c,
                              const OptionalTensor& d, const OptionalTensor& weight, int64_t formula,
                              std::optional<at::ArrayRef<double>> numbers, int64_t activation, int64_t reduction,
                              std::array<bool, 4> wants) {
  PassCall call = call_of(a, b, c, d, weight, formula, numbers, activation, reduction);
  call.upstream = g;
  call.wants = wants;
  return defined_only(run(call).d);
}

// For compilers and ONNX.
Tensor composed(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                const OptionalTensor& weight, int64_t formula, const OptionalTensor& numbers, int64_t activation,
                int64_t reduction) {
  const PassCall call = call_of(a, b, c, d, weight, formula, {}, activation, reduction);
  check_loss(op_of(formula), call.loss, call.in, call.weight, or_undefined(numbers));
  return composed_loss(call.loss, call.in, call.weight, or_undefined(numbers));
}

// On devices without kernels.
Tensor elsewhere(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                 const OptionalTensor& weight, int64_t formula, std::optional<at::ArrayRef<double>> numbers,
                 int64_t activation, int64_t reduction) {
  const PassCall call = call_of(a, b, c, d, weight, formula, numbers, activation, reduction);
  check_loss(op_of(formula), call.loss, call.in, call.weight);
  return composed_loss(call.loss, call.in, call.weight, {});
}

// ---- Autograd.

struct ElementwiseLoss {
  static constexpr const char* kName = "FastvaeElementwiseLossBackward";
  static constexpr int kInputs = kMaxInputs, kSaved = kMaxInputs + 2;  // and weight, lifted numbers
  Loss loss;
  auto options() const { return loss.integers(); }

  void lift_numbers(std::array<torch::autograd::SavedVariable, kSaved>& saved) {
    if (!loss.numbers.empty()) lift(saved[5], loss.numbers);
  }

  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_elementwise_loss_gradients");
    if (saved[5].defined()) return differentiable_backward(g, saved, wants);
    return placed(op.call(g[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]), optional(saved[4]),
                          loss.formula, loss.numbers, loss.activation, static_cast<int64_t>(loss.reduction), wants),
                  wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    return composed_gradients(g[0], loss, {saved[0], saved[1], saved[2], saved[3]}, saved[4], saved[5], wants);
  }
};

Tensor autograd(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                const OptionalTensor& weight, int64_t formula, std::optional<at::ArrayRef<double>> numbers,
                int64_t activation, int64_t reduction) {
  static const auto value_op = find_op<decltype(elementwise_loss)>("fastvae::elementwise_loss");
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_elementwise_loss_with_gradients");
  const Inputs in{a, b, or_undefined(c), or_undefined(d)};
  const bool differentiate = torch::autograd::compute_requires_grad(a, b, c, d);
  Tensor value;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && is_scalar(static_cast<Reduction>(reduction)) && may_keep_gradients(in)) {
      const auto wants = wanted(in);
      std::vector<Tensor> made;
      std::tie(value, made) =
          with_gradients_op.call(a, b, c, d, weight, formula, numbers, activation, reduction, wants);
      kept = placed(made, wants);
    } else {
      value = value_op.call(a, b, c, d, weight, formula, numbers, activation, reduction);
    }
  }
  const Loss loss = loss_of(formula, numbers, activation, reduction);
  const Tensor w = or_undefined(weight);
  if (differentiate) {
    torch::autograd::set_history(value,
                                 record(ElementwiseLoss{loss}, in, {a, b, in[2], in[3], w, Tensor()}, std::move(kept)));
  }
  set_tangent(value, composed_tangent(loss, in, w));
  return value;
}

#define FASTVAE_INPUTS "Tensor a, Tensor b, Tensor? c, Tensor? d, Tensor? weight, int formula, "
#define FASTVAE_OPTIONS "int activation, int reduction"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("formulas() -> str[]", formulas);
  m.def("elementwise_loss(" FASTVAE_INPUTS "float[]? numbers, " FASTVAE_OPTIONS ") -> Tensor", kPure);
  m.def("_elementwise_loss_with_gradients(" FASTVAE_INPUTS "float[]? numbers, " FASTVAE_OPTIONS
        ", bool[4] wants) -> (Tensor, Tensor[])",
        kPure);
  m.def("_elementwise_loss_gradients(Tensor g, " FASTVAE_INPUTS "float[]? numbers, " FASTVAE_OPTIONS
        ", bool[4] wants) -> Tensor[]",
        kPure);
  m.def("elementwise_loss_composed(" FASTVAE_INPUTS "Tensor? numbers, " FASTVAE_OPTIONS ") -> Tensor", composed, kPure);
  implement(m, "elementwise_loss", elementwise_loss);
  implement_elsewhere(m, "elementwise_loss", elsewhere);
  implement_inner(m, "_elementwise_loss_with_gradients", with_gradients);
  implement_inner(m, "_elementwise_loss_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("elementwise_loss", autograd); }

}  // namespace fastvae
