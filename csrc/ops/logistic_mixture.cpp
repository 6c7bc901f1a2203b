// The discretized mixture of logistics: one value for each pixel. Its arithmetic is expensive, so for every reduction
// its gradients are made in the forward pass and scaled in the backward pass.
#include "../formulas/logistic_mixture.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>

#include "autograd.h"
#include "elements.h"
#include "views.h"

namespace fastvae {

// In aten ops the low part of the tanh is 0.
template <class S>
Coefficient<Elements<S>> coefficient(const Elements<S>& x) {
  const Tensor tanh = at::tanh(x.tensor);
  return {{Elements<S>(tanh), Elements<S>(S(0))}, Elements<S>(1 - tanh * tanh)};
}

namespace {

// The options of the loss.
struct Form {
  int64_t components, dim, reduction;  // dim: of the channels
  std::vector<double> numbers;         // those of Mixture, in its order

  Reduction reduce() const { return static_cast<Reduction>(reduction); }
  Mixture mixture(int64_t channels) const {
    return {static_cast<int>(components),
            static_cast<int>(channels),
            numbers[0],
            numbers[1],
            numbers[2],
            numbers[3],
            numbers[4],
            numbers[5]};
  }
  // "mean" is over the elements of x. A pixel has one element for each channel.
  double each(int64_t channels) const { return reduce() == Reduction::mean ? static_cast<double>(channels) : 1; }
};

Form form_of(const char* op, const Tensor& recon_x, int64_t components, int64_t channel_dim,
             at::ArrayRef<double> numbers, int64_t reduction) {
  check_tensor(op, "recon_x", recon_x);
  const int64_t dim = channel_dim < 0 ? channel_dim + recon_x.dim() : channel_dim;
  TORCH_CHECK_VALUE(dim > 0 && dim < recon_x.dim(), op, ": channel_dim=", channel_dim,
                    " must be a dimension of recon_x after the batch's, but recon_x's shape is ", recon_x.sym_sizes());
  TORCH_CHECK_VALUE(numbers.size() == 6, op, ": a mixture of logistics has 6 numbers, but got ", numbers.size());
  const Form form{components, dim, reduction, numbers.vec()};
  const auto rows = recon_x.sym_size(dim);
  TORCH_CHECK_VALUE(rows == parameters_of(form.mixture(3)) || rows == parameters_of(form.mixture(1)), op, ": ",
                    components, " components need ", parameters_of(form.mixture(3)), " channels of recon_x (",
                    parameters_of(form.mixture(1)), " for pictures of one channel), but dimension ", dim, " of ",
                    recon_x.sym_sizes(), " has ", rows);
  return form;
}

int64_t channels_of(const Form& form, const Tensor& recon_x) {
  return recon_x.sym_size(form.dim) == parameters_of(form.mixture(3)) ? 3 : 1;
}

// The weight of each pixel.
Tensor pixel_weight(const Form& form, const Tensor& weight, const Tensor& x) {
  if (!weight.defined()) return weight;
  auto shape = x.sym_sizes().vec();
  shape[form.dim] = 1;
  return weight.expand_symint(shape).select(form.dim, 0);
}

void check(const char* op, const Form& form, const Tensor& recon_x, const Tensor& x, const Tensor& weight) {
  check_tensor(op, "x", x, /*may_be_integer=*/true);
  auto shape = recon_x.sym_sizes().vec();
  shape[form.dim] = channels_of(form, recon_x);
  TORCH_CHECK_VALUE(x.sym_sizes() == c10::SymIntArrayRef(shape), op, ": recon_x of shape ", recon_x.sym_sizes(),
                    " goes with an x of shape ", c10::SymIntArrayRef(shape), ", but got ", x.sym_sizes());
  check_same_device(op, "recon_x", recon_x, "x", x);
  if (!is_supported_integer(x.scalar_type())) check_same_arithmetic(op, "recon_x", recon_x, "x", x);
  TORCH_CHECK_VALUE(x.scalar_type() != at::kByte || form.numbers[4] != 1, op,
                    ": x is uint8: pixels in 0..255 need LogisticMixture(x_range=(0, 255))");
  TORCH_CHECK_VALUE(form.reduce() != Reduction::channel && form.reduce() != Reduction::latent, op,
                    ": a mixture of logistics has one value for all channels of a pixel, and so no reduction "
                    "\"channel\"; use \"none\"");
  TORCH_CHECK_VALUE(!is_sample(form.reduce()) || batch_dims(form.reduce()) <= form.dim, op, ": batch_dims is ",
                    batch_dims(form.reduce()), ", but dimension ", form.dim, " is the channels', which have one value");
  if (!weight.defined()) return;
  check_weight(op, weight, "x", x);
  const int64_t from_end = x.dim() - form.dim;
  TORCH_CHECK_VALUE(weight.dim() < from_end || weight.sym_size(-from_end) == 1, op,
                    ": a mixture of logistics has one value for all channels of a pixel: weight must have size 1 in "
                    "dimension ",
                    form.dim, " of x, but its shape is ", weight.sym_sizes());
}

// ---- On the devices, and Meta.

// The arguments of a pass, without its results.
MixtureArgs args_of(const Form& form, const Tensor& recon_x, const Tensor& pixels) {
  MixtureArgs args;
  args.numel = pixels.numel();
  args.float64 = recon_x.scalar_type() == at::kDouble;
  args.mixture = form.mixture(channels_of(form, recon_x));
  args.in[0] = view_of(pixels);
  args.step[0] = recon_x.stride(form.dim);
  return args;
}

struct Results {
  Tensor value;
  std::array<Tensor, 2> d;
};

Results run(const Form& form, const Tensor& recon_x, const Tensor& x, const Tensor& weight, const Tensor& upstream,
            bool want_value, Wants<2> wants) {
  const Reduction r = form.reduce();
  const Tensor pixels = recon_x.select(form.dim, 0), w = pixel_weight(form, weight, x);
  const double each = form.each(x.size(form.dim));
  Results results;
  if (want_value) results.value = empty_result(r, pixels);
  if (wants[0]) results.d[0] = at::empty_like(recon_x);
  if (wants[1]) results.d[1] = at::empty_like(x);
  if (recon_x.is_meta()) return results;
  if (pixels.numel() == 0) {  // gradients have no elements
    if (want_value) results.value.fill_(0 / divisor_value(r, pixels));
    return results;
  }
  MixtureArgs args = args_of(form, recon_x, pixels);
  const auto add = [&](const Tensor& t, View& view, int64_t& step) {
    if (!t.defined()) return;
    view = view_of(t.select(form.dim, 0));
    step = t.stride(form.dim);
  };
  add(x, args.in[1], args.step[1]);
  for (int i = 0; i < 2; ++i) add(results.d[i], args.d[i], args.d_step[i]);
  args.may_be_kept = true;
  args.sums = sums_of(results.value, r, pixels);
  const Tensor weights = weight_sum(r, w, pixels), spread = unreduced(upstream, r, pixels);
  args.sums.divisor = weights.defined() ? each : args.sums.divisor * each;
  args.sums.divisor_at = number_of(weights);
  args.scale = 1 / args.sums.divisor;
  args.upstream = view_of(spread, pixels, {});
  args.weight = view_of(w);
  if (args.sums.data == nullptr) args.value = view_of(results.value);
  run_logistic_mixture(recon_x, args);
  return results;
}

constexpr const char* kOp = "fastvae.reconstruction_loss";

std::tuple<Tensor, std::vector<Tensor>> with_gradients(const Tensor& recon_x, const Tensor& x,
                                                       const OptionalTensor& weight, int64_t components,
                                                       int64_t channel_dim, at::ArrayRef<double> numbers,
                                                       int64_t reduction, std::array<bool, 2> wants) {
  const Form form = form_of(kOp, recon_x, components, channel_dim, numbers, reduction);
  check(kOp, form, recon_x, x, or_undefined(weight));
  const Results results = run(form, recon_x, x, or_undefined(weight), {}, /*want_value=*/true, wants);
  return {results.value, defined_only(results.d)};
}

Tensor logistic_mixture(const Tensor& recon_x, const Tensor& x, const OptionalTensor& weight, int64_t components,
                        int64_t channel_dim, at::ArrayRef<double> numbers, int64_t reduction) {
  return std::get<0>(with_gradients(recon_x, x, weight, components, channel_dim, numbers, reduction, {}));
}

std::vector<Tensor> gradients(const Tensor& g, const Tensor& recon_x, const Tensor& x, const OptionalTensor& weight,
                              int64_t components, int64_t channel_dim, at::ArrayRef<double> numbers, int64_t reduction,
                              std::array<bool, 2> wants) {
  const Form form = form_of(kOp, recon_x, components, channel_dim, numbers, reduction);
  return defined_only(run(form, recon_x, x, or_undefined(weight), g, /*want_value=*/false, wants).d);
}

// ---- In aten ops: the same formula, for second derivatives, forward mode and devices without kernels.

// The value of each pixel, and the derivatives by the parameters and by x.
struct Composed {
  Tensor value;
  std::array<Tensor, 2> d;
};

template <class S>
Composed compose_as(const Form& form, const Tensor& recon_x, const Tensor& data, const Tensor& weight) {
  using T = Elements<S>;
  constexpr auto dtype = c10::CppTypeToScalarType<S>::value;
  const int64_t C = channels_of(form, recon_x), K = form.components;
  const Mixture m = form.mixture(C);
  Tensor p = widened(recon_x, dtype).movedim(form.dim, 0), x = widened(data, dtype).movedim(form.dim, 0);
  if (weight.defined()) {  // 0.5 makes no NaN, so no derivative is 0 times NaN
    const Tensor absent = weight == 0;
    p = at::where(absent, at::scalar_tensor(0.5, p.options()), p);
    x = at::where(absent, at::scalar_tensor(0.5, x.options()), x);
  }
  if (m.scale != 1 || m.shift != 0) x = x * m.scale + m.shift;
  const auto rows = [&](int64_t first) { return T(p.narrow(0, first, K)); };
  Pair<T> at[3];
  Coefficient<T> by[3];
  for (int c = 0; c < C; ++c) {
    at[c] = {T(x.narrow(0, c, 1)), T(S(0))};
    if (C == 3) by[c] = coefficient(rows(mean_row(m, c) + 2 * K));
  }
  const Tensor logits = p.narrow(0, 0, K);
  Tensor joint = logits;
  LogisticBin<T> bin[3];
  for (int c = 0; c < C; ++c) {
    const T mean = rows(mean_row(m, c)), d = c == 0   ? distance<0>(at, mean, by[0].tanh, by[0].tanh)
                                             : c == 1 ? distance<1>(at, mean, by[0].tanh, by[0].tanh)
                                                      : distance<2>(at, mean, by[1].tanh, by[2].tanh);
    const T log_scale = rows(mean_row(m, c) + K), half_width(static_cast<S>(m.half_width)),
            least(static_cast<S>(m.least_log_scale));
    const T edge = edge_of(at[c].high, T(static_cast<S>(m.low)), T(static_cast<S>(m.high)));
    const Edges<T> edges = edges_of(d, log_scale, edge, half_width, least);
    bin[c] = logistic_bin(edges, tails_of(edges), log_scale, half_width, least);
    joint = joint + (logarithm(bin[c].ratio).tensor - bin[c].exponent.tensor);
  }
  const Tensor w = at::softmax(joint, 0);
  Tensor g[3], g_x[3];
  for (int c = 0; c < C; ++c) {
    g[c] = w * bin[c].by_distance.tensor;
    g_x[c] = -g[c].sum(0);
  }
  std::vector<Tensor> d{at::softmax(logits, 0) - w};
  for (int c = 0; c < C; ++c) {
    d.push_back(g[c]);
    d.push_back(-(w * bin[c].by_log_scale.tensor));
    if (C == 1) continue;
    const int to = c == 0 ? 1 : 2, of = c == 2 ? 1 : 0;
    d.push_back(g[to] * at[of].high.tensor * by[c].slope.tensor);
    g_x[of] = g_x[of] + (by[c].tanh.high.tensor * g[to]).sum(0);
  }
  Composed composed{
      at::logsumexp(logits, 0) - at::logsumexp(joint, 0),
      {at::cat(d).movedim(0, form.dim), (at::stack({g_x, static_cast<size_t>(C)}) * m.scale).movedim(0, form.dim)}};
  if (weight.defined()) {
    const Tensor wide = widened(weight, dtype);
    composed.value = composed.value * wide;
    for (Tensor& t : composed.d) t = t * wide.unsqueeze(form.dim);
  }
  return composed;
}

Composed compose(const Form& form, const Tensor& recon_x, const Tensor& x, const Tensor& weight) {
  return (recon_x.scalar_type() == at::kDouble ? compose_as<double> : compose_as<float>)(form, recon_x, x, weight);
}

Tensor reduced_pixels(const Form& form, const Tensor& value, const Tensor& weight, int64_t channels) {
  const Tensor result = reduced(value, form.reduce(), weight);
  return form.reduce() == Reduction::mean ? result / form.each(channels) : result;
}

Tensor elsewhere(const Tensor& recon_x, const Tensor& x, const OptionalTensor& weight, int64_t components,
                 int64_t channel_dim, at::ArrayRef<double> numbers, int64_t reduction) {
  const Form form = form_of(kOp, recon_x, components, channel_dim, numbers, reduction);
  check(kOp, form, recon_x, x, or_undefined(weight));
  const Tensor w = pixel_weight(form, or_undefined(weight), x);
  return reduced_pixels(form, compose(form, recon_x, x, w).value, w, channels_of(form, recon_x));
}

// ---- Autograd.

struct LogisticMixture {
  static constexpr const char* kName = "FastvaeLogisticMixtureBackward";
  static constexpr int kInputs = 2, kSaved = 3;  // and weight
  Form form;
  auto options() const { return std::tie(form.components, form.dim, form.reduction, form.numbers); }

  // The gradient of the result as a factor of the inputs' gradients.
  Tensor factor(const Tensor& g, const Tensor& like) const {
    if (is_scalar(form.reduce())) return g;
    return unreduced(g, form.reduce(), like.select(form.dim, 0)).unsqueeze(form.dim);
  }
  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_logistic_mixture_gradients");
    return placed(op.call(g[0], saved[0], saved[1], optional(saved[2]), form.components, form.dim, form.numbers,
                          form.reduction, wants),
                  wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    const Tensor w = pixel_weight(form, saved[2], saved[1]);
    const Composed composed = compose(form, saved[0], saved[1], w);
    Tensor of_pixel = spread(g[0], form.reduce(), composed.value, w);
    if (form.reduce() == Reduction::mean) of_pixel = of_pixel / form.each(channels_of(form, saved[0]));
    if (of_pixel.dim() > 0) of_pixel = of_pixel.unsqueeze(form.dim);
    variable_list gradients(kInputs);
    for (int i = 0; i < kInputs; ++i)
      if (wants[i]) gradients[i] = (of_pixel * composed.d[i]).to(saved[i].scalar_type());
    return gradients;
  }
};

// The tangent of the loss; undefined if no input has one.
Tensor tangent_of(const Form& form, const std::array<Tensor, 2>& in, const Tensor& weight) {
  const auto tangents = tangents_of(in);
  if (!any_defined(tangents)) return {};
  const auto primal = [](const Tensor& t) { return t._fw_primal(/*level=*/0); };
  const Tensor w = pixel_weight(form, weight, in[1]);
  const Composed composed = compose(form, primal(in[0]), primal(in[1]), w);
  Tensor total;
  for (int i = 0; i < 2; ++i) {
    if (tangents[i].defined()) total = sum(total, (composed.d[i] * widened(tangents[i])).sum(form.dim));
  }
  return reduced_pixels(form, total, w, channels_of(form, in[0]));
}

Tensor autograd(const Tensor& recon_x, const Tensor& x, const OptionalTensor& weight, int64_t components,
                int64_t channel_dim, at::ArrayRef<double> numbers, int64_t reduction) {
  static const auto value_op = find_op<decltype(logistic_mixture)>("fastvae::logistic_mixture");
  static const auto with_gradients_op = find_op<decltype(with_gradients)>("fastvae::_logistic_mixture_with_gradients");
  const std::array<Tensor, 2> in{recon_x, x};
  const bool differentiate = torch::autograd::compute_requires_grad(recon_x, x);
  Tensor value;
  variable_list kept;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && may_keep_gradients(in)) {
      const auto wants = wanted(in);
      std::vector<Tensor> made;
      std::tie(value, made) =
          with_gradients_op.call(recon_x, x, weight, components, channel_dim, numbers, reduction, wants);
      kept = placed(made, wants);
    } else {
      value = value_op.call(recon_x, x, weight, components, channel_dim, numbers, reduction);
    }
  }
  const Form form = form_of(kOp, recon_x, components, channel_dim, numbers, reduction);
  const Tensor w = or_undefined(weight);
  if (differentiate)
    torch::autograd::set_history(value, record(LogisticMixture{form}, in, {recon_x, x, w}, std::move(kept)));
  set_tangent(value, tangent_of(form, in, w));
  return value;
}

// ---- Samples.

Tensor draw_mixture(const Tensor& recon_x, std::optional<at::Generator> generator, int64_t components,
                    int64_t channel_dim, at::ArrayRef<double> numbers, int64_t /*draw*/) {
  constexpr const char* kSample = "fastvae.likelihoods.LogisticMixture.sample";
  const Form form = form_of(kSample, recon_x, components, channel_dim, numbers, 0);
  if (generator.has_value() && generator->defined()) {
    TORCH_CHECK(recon_x.is_meta() || generator->device() == recon_x.device(), kSample,
                ": generator must be on recon_x's device ", recon_x.device(), ", but it is on ", generator->device());
  }
  auto shape = recon_x.sym_sizes().vec();
  shape[form.dim] = channels_of(form, recon_x);
  Tensor out = at::empty_symint(shape, recon_x.options());
  if (recon_x.is_meta() || recon_x.numel() == 0) return out;
  const Draw drawn = draw(recon_x, generator);
  MixtureArgs args = args_of(form, recon_x, recon_x.select(form.dim, 0));
  args.noise = drawn.noise;
  args.z = view_of(out.select(form.dim, 0));
  args.z_step = out.stride(form.dim);
  run_logistic_mixture(recon_x, args);
  return out;
}

Tensor draw_mixture_autograd(const Tensor& recon_x, std::optional<at::Generator> generator, int64_t components,
                             int64_t channel_dim, at::ArrayRef<double> numbers, int64_t /*draw*/) {
  static const auto op = find_op<decltype(draw_mixture)>("fastvae::logistic_mixture_sample");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(recon_x, generator, components, channel_dim, numbers, next_draw(recon_x));
}

#define FASTVAE_MIXTURE "int components, int channel_dim, float[] numbers, "

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("logistic_mixture(Tensor recon_x, Tensor x, Tensor? weight, " FASTVAE_MIXTURE "int reduction) -> Tensor",
        kPure);
  m.def("_logistic_mixture_with_gradients(Tensor recon_x, Tensor x, Tensor? weight, " FASTVAE_MIXTURE
        "int reduction, bool[2] wants) -> (Tensor, Tensor[])",
        kPure);
  m.def("_logistic_mixture_gradients(Tensor g, Tensor recon_x, Tensor x, Tensor? weight, " FASTVAE_MIXTURE
        "int reduction, bool[2] wants) -> Tensor[]",
        kPure);
  m.def("logistic_mixture_sample(Tensor recon_x, Generator? generator, " FASTVAE_MIXTURE "int draw=0) -> Tensor",
        kRandom);
  implement(m, "logistic_mixture", logistic_mixture);
  implement_elsewhere(m, "logistic_mixture", elsewhere);
  implement_inner(m, "_logistic_mixture_with_gradients", with_gradients);
  implement_inner(m, "_logistic_mixture_gradients", gradients);
  implement(m, "logistic_mixture_sample", draw_mixture);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("logistic_mixture", autograd);
  m.impl("logistic_mixture_sample", draw_mixture_autograd);
}

}  // namespace fastvae
