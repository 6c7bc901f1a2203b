// Sums over the pairs of samples and Gaussian components (csrc/pairwise): mixture_log_prob, aggregate_posterior and
// kl_decomposition are one op. Its backward pass recomputes from the inputs and from the sums of the forward pass.
#include "../pairwise/pairwise.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "composed.h"

namespace fastvae {
namespace {

constexpr double kLog2Pi = 1.8378770664093454836;

// The wanted results, as the integers that fastvae/pairwise.py makes of their names.
enum class Of : int64_t { mixture, marginals, posterior, decomposition };
enum class Estimator : int64_t { stratified, weighted };
struct Options {
  double dataset_size = 1;
  Estimator estimator = Estimator::stratified;
  Of of = Of::mixture;
  Reduction reduction = Reduction::batchmean;

  bool joint() const { return of != Of::marginals; }
  bool marginals() const { return of != Of::mixture; }
  bool decompose() const { return of == Of::decomposition; }
  const char* op() const {
    return decompose()           ? "fastvae.kl_decomposition"
           : of == Of::posterior ? "fastvae.aggregate_posterior"
                                 : "fastvae.mixture_log_prob";
  }
};
Options options_of(double dataset_size, int64_t estimator, int64_t of, int64_t reduction) {
  return {dataset_size, static_cast<Estimator>(estimator), static_cast<Of>(of), static_cast<Reduction>(reduction)};
}

void check(const Options& o, const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& weight) {
  const char* op = o.op();
  check_tensor(op, "z", z);
  check_batch(op, "z", z);
  check_tensor(op, "mu", mu);
  check_same_device(op, "z", z, "mu", mu);
  check_same_arithmetic(op, "z", z, "mu", mu);
  TORCH_CHECK_VALUE(mu.dim() == 2 && mu.sym_size(1) == z.sym_size(-1), op,
                    ": mu must be [K, L], a row for each component and z's last dimension, ", z.sym_size(-1),
                    ", but got ", mu.sym_sizes());
  check_posterior(op, mu, logvar);
  const bool of_batch = o.of == Of::posterior || o.decompose();
  if (of_batch) {
    TORCH_CHECK_VALUE(z.dim() == 2, op, ": z must be [B, L], but got ", z.sym_sizes(),
                      "; flatten what is a batch, and what is a latent");
  }
  if (weight.has_value()) {
    check_tensor(op, "log_weight", *weight);
    check_same_device(op, "z", z, "log_weight", *weight);
    check_same_arithmetic(op, "z", z, "log_weight", *weight);
    auto by_row = z.sym_sizes().vec();
    by_row.back() = mu.sym_size(0);
    const bool shared = weight->dim() == 1 && weight->sym_size(0) == mu.sym_size(0);
    TORCH_CHECK_VALUE(shared || weight->sym_sizes() == c10::SymIntArrayRef(by_row), op, ": log_weight must be [",
                      mu.sym_size(0), "], a number for each component, or ", c10::SymIntArrayRef(by_row), ", but got ",
                      weight->sym_sizes());
  } else if (of_batch) {
    TORCH_CHECK_VALUE(mu.sym_size(0) >= z.sym_size(0), op,
                      ": mu must have a row for each sample, those of z first, but got ", mu.sym_size(0), " rows for ",
                      z.sym_size(0), " samples");
    TORCH_CHECK_VALUE(mu.is_meta() || o.dataset_size >= static_cast<double>(mu.size(0)), op,
                      ": dataset_size must be at least the number of samples that the posterior is made of, ",
                      mu.sym_size(0), ", but got ", o.dataset_size);
  }
}

// The logarithms of the weights w_ii (own) and w_ij (other).
struct LogWeights {
  double own = 0, other = 0;
};
LogWeights log_weights(const Options& o, double components) {
  const double n = o.dataset_size;
  if (o.estimator == Estimator::weighted) return {-std::log(n * components), -std::log(n * components)};
  const double own = -std::log(n);
  return {own, components > 1 ? std::log((n - 1) / (n * (components - 1))) : own};
}

// ---- On the devices, and Meta.

Tensor ready(const Tensor& t, at::ScalarType dtype) { return t.to(dtype).contiguous(); }

// The arguments; `alive` holds what they point to.
PairwiseArgs args_of(const Options& o, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                     const OptionalTensor& weight, const Tensor& stats, std::vector<Tensor>& alive) {
  const auto dtype = result_type(z);
  const auto data = [&](const Tensor& t) {
    alive.push_back(ready(t, dtype));
    return alive.back().const_data_ptr();
  };
  PairwiseArgs args;
  args.components = mu.size(0);
  args.dims = mu.size(1);
  args.rows = 1;
  for (int64_t d = 0; d + 1 < z.dim(); ++d) args.rows *= z.size(d);
  args.float64 = dtype == at::kDouble;
  args.joint = o.joint();
  args.marginals = o.marginals();
  args.decompose = o.decompose();
  args.z = data(z);
  args.mu = data(mu);
  args.logvar = data(logvar);
  if (weight.has_value()) {
    args.log_weight = data(*weight);
    args.weight_by_row = weight->dim() > 1 || z.dim() == 1;
    if (weight->dim() == 1) args.weight_by_row = false;
  } else if (o.of == Of::posterior || o.decompose()) {
    const LogWeights w = log_weights(o, static_cast<double>(args.components));
    args.own = w.own;
    args.other = w.other;
  }
  args.stats = stats.data_ptr();
  args.by_row = o.reduction == Reduction::sample;
  args.divisor = divisor_value(o.reduction, z);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> with_stats(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const OptionalTensor& log_weight, double dataset_size,
                                                      int64_t estimator, int64_t of, int64_t reduction) {
  const Options o = options_of(dataset_size, estimator, of, reduction);
  check(o, z, mu, logvar, log_weight);
  const auto options = z.options().dtype(result_type(z));
  const auto batch = z.sym_sizes().slice(0, z.dim() - 1);
  Tensor out[3];
  for (int k = 0; k < 3; ++k) {
    if (o.decompose()) {
      out[k] = empty_result(o.reduction, z);
    } else {
      const bool there = (k == 0 && o.joint()) || (k == 1 && o.marginals());
      out[k] = !there ? at::empty({0}, options) : at::empty_symint(k == 0 ? batch : z.sym_sizes(), options);
    }
  }
  const c10::SymInt rows = c10::multiply_integers(batch);
  const Tensor stats = at::zeros_symint(
      {(rows + (kPairRows - 1)) / kPairRows * kPairRows * (o.marginals() ? z.sym_size(-1) * 2 + 2 : 2)}, options);
  if (!z.is_meta()) {
    std::vector<Tensor> alive;
    PairwiseArgs args = args_of(o, z, mu, logvar, log_weight, stats, alive);
    for (int k = 0; k < 3 && o.decompose(); ++k) args.terms[k] = out[k].data_ptr();
    if (!o.decompose() && o.joint()) args.log_q = out[0].data_ptr();
    if (!o.decompose() && o.marginals()) args.log_q_dims = out[1].data_ptr();
    run_pairwise(z, args, /*backward=*/false);
  }
  return {out[0], out[1], out[2], stats};
}

std::tuple<Tensor, Tensor, Tensor> pairwise(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                            const OptionalTensor& log_weight, double dataset_size, int64_t estimator,
                                            int64_t of, int64_t reduction) {
  const auto [a, b, c, stats] = with_stats(z, mu, logvar, log_weight, dataset_size, estimator, of, reduction);
  return {a, b, c};
}

std::vector<Tensor> gradients(const OptionalTensor& g0, const OptionalTensor& g1, const OptionalTensor& g2,
                              const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight,
                              const Tensor& stats, double dataset_size, int64_t estimator, int64_t of,
                              int64_t reduction, std::array<bool, 4> wants) {
  const Options o = options_of(dataset_size, estimator, of, reduction);
  const auto dtype = result_type(z);
  const Tensor* inputs[] = {&z, &mu, &logvar, log_weight.has_value() ? &*log_weight : nullptr};
  std::array<Tensor, 4> d;
  for (int k = 0; k < 4; ++k) {
    if (wants[k]) d[k] = at::empty_symint(inputs[k]->sym_sizes(), inputs[k]->options().dtype(dtype));
  }
  if (!z.is_meta()) {
    std::vector<Tensor> alive;
    PairwiseArgs args = args_of(o, z, mu, logvar, log_weight, stats, alive);
    const OptionalTensor* g[] = {&g0, &g1, &g2};
    for (int k = 0; k < 3; ++k) {
      if (!g[k]->has_value()) continue;
      alive.push_back(ready(**g[k], dtype));
      args.g[k] = alive.back().const_data_ptr();
    }
    void** to[] = {&args.dz, &args.dmu, &args.dlogvar, &args.dlog_weight};
    for (int k = 0; k < 4; ++k) *to[k] = wants[k] ? d[k].data_ptr() : nullptr;
    run_pairwise(z, args, /*backward=*/true);
  }
  for (int k = 0; k < 4; ++k) {
    if (wants[k]) d[k] = d[k].to(inputs[k]->scalar_type());
  }
  return defined_only(d);
}

// ---- In aten ops, with all pairs in memory.

// u = (z - mu) / sigma, a = 1 / sigma and l of all pairs, [rows, K, L]; the log-weights, [rows or 1, K].
struct Pairs {
  Tensor z, u, a, l, weight;
  Tensor own;  // where a row meets its own component
};
Pairs pairs_of(const Options& o, const Tensor& z, const Tensor& mu, const Tensor& logvar, const Tensor& weight) {
  Pairs p;
  const Tensor wide_logvar = widened(logvar);
  p.z = widened(z).reshape_symint({c10::multiply_integers(z.sym_sizes().slice(0, z.dim() - 1)), z.sym_size(-1)});
  p.a = at::exp(-0.5 * wide_logvar);
  p.u = (p.z.unsqueeze(1) - widened(mu)) * p.a;
  p.l = -0.5 * (p.u * p.u + wide_logvar + kLog2Pi);
  const auto options = p.z.options();
  if (weight.defined()) {
    p.weight = widened(weight).reshape_symint({weight.dim() == 1 ? 1 : p.z.sym_size(0), mu.sym_size(0)});
  } else if (o.of == Of::posterior || o.decompose()) {
    const auto index = options.dtype(at::kLong);
    p.own = at::arange(p.z.sym_size(0), index).unsqueeze(1) == at::arange(mu.sym_size(0), index);
    const LogWeights w = log_weights(o, static_cast<double>(mu.sym_size(0).guard_int(__FILE__, __LINE__)));
    p.weight = at::where(p.own, at::scalar_tensor(w.own, options), at::scalar_tensor(w.other, options));
  } else {
    p.weight = at::zeros_symint({1, mu.sym_size(0)}, options);
  }
  return p;
}

// The three terms of the decomposition, each [rows].
std::array<Tensor, 3> decomposed(const Pairs& p, const Tensor& log_q, const Tensor& log_q_dims) {
  const Tensor own = at::where(p.own, p.l.sum(-1), at::scalar_tensor(0, p.z.options())).sum(1);
  const Tensor log_prod = log_q_dims.sum(1), log_p = (-0.5 * (p.z * p.z + kLog2Pi)).sum(1);
  return {own - log_q, log_q - log_prod, log_prod - log_p};
}

std::tuple<Tensor, Tensor, Tensor> composed(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                            const OptionalTensor& log_weight, double dataset_size, int64_t estimator,
                                            int64_t of, int64_t reduction) {
  const Options o = options_of(dataset_size, estimator, of, reduction);
  check(o, z, mu, logvar, log_weight);
  const Pairs p = pairs_of(o, z, mu, logvar, or_undefined(log_weight));
  const Tensor none = at::empty({0}, p.z.options());
  const Tensor log_q = o.joint() ? at::logsumexp(p.l.sum(-1) + p.weight, {1}) : Tensor();
  const Tensor log_q_dims = o.marginals() ? at::logsumexp(p.l + p.weight.unsqueeze(-1), {1}) : Tensor();
  if (!o.decompose()) {
    const auto batch = z.sym_sizes().slice(0, z.dim() - 1);
    return {o.joint() ? log_q.reshape_symint(batch) : none,
            o.marginals() ? log_q_dims.reshape_symint(z.sym_sizes()) : none, none};
  }
  std::array<Tensor, 3> terms = decomposed(p, log_q, log_q_dims);
  for (Tensor& term : terms) term = reduced(term, o.reduction, {});
  return {terms[0], terms[1], terms[2]};
}

// The gradients of composed() (pairwise.h), differentiable.
variable_list composed_gradients(const variable_list& g, const Options& o, const Tensor& z, const Tensor& mu,
                                 const Tensor& logvar, const Tensor& weight, const Wants<4>& wants) {
  const Pairs p = pairs_of(o, z, mu, logvar, weight);
  const auto dtype = p.z.scalar_type();
  Tensor g_joint, g_dims, g_own, g_z;  // [rows, 1, 1], [rows, 1, L or 1], twice [rows, 1]
  if (o.decompose()) {
    const auto upstream = [&](int k) {
      Tensor t = g[k].defined() ? g[k].to(dtype) : at::zeros({}, p.z.options());
      if (o.reduction == Reduction::batchmean) t = t / at::Scalar(z.sym_size(0));
      return t.reshape_symint({o.reduction == Reduction::sample ? p.z.sym_size(0) : c10::SymInt(1), 1});
    };
    g_own = upstream(0);
    g_z = upstream(2);
    g_joint = (upstream(1) - g_own).unsqueeze(-1);
    g_dims = (g_z - upstream(1)).unsqueeze(-1);
  } else {
    if (g[0].defined() && o.joint()) g_joint = g[0].to(dtype).reshape({-1, 1, 1});
    if (g[1].defined() && o.marginals()) g_dims = g[1].to(dtype).reshape_symint(p.z.sym_sizes()).unsqueeze(1);
  }
  Tensor d_l, d_weight;  // [rows, K, L or 1], [rows, K]
  const auto add = [](Tensor& to, const Tensor& t) { to = sum(to, t); };
  if (g_joint.defined()) {
    d_l = g_joint * (p.l.sum(-1) + p.weight).softmax(1).unsqueeze(-1);
    d_weight = d_l.squeeze(-1);
  }
  if (g_own.defined()) add(d_l, (g_own * p.own).unsqueeze(-1));
  if (g_dims.defined()) {
    const Tensor by_dims = g_dims * (p.l + p.weight.unsqueeze(-1)).softmax(1);
    add(d_l, by_dims);
    add(d_weight, by_dims.sum(-1));
  }
  variable_list d(4);
  const Tensor pull = d_l * p.u * p.a;
  if (wants[0]) {
    d[0] = -pull.sum(1);
    if (g_z.defined()) d[0] = d[0] + g_z * p.z;
    d[0] = d[0].reshape_symint(z.sym_sizes()).to(z.scalar_type());
  }
  if (wants[1]) d[1] = pull.sum(0).to(mu.scalar_type());
  if (wants[2]) d[2] = (0.5 * d_l * (p.u * p.u - 1)).sum(0).to(logvar.scalar_type());
  if (wants[3])
    d[3] = (weight.dim() == 1 ? d_weight.sum(0) : d_weight.reshape_symint(weight.sym_sizes())).to(weight.scalar_type());
  return d;
}

// ---- Autograd.

struct Pairwise {
  static constexpr const char* kName = "FastvaePairwiseBackward";
  static constexpr int kInputs = 4, kSaved = 5;  // z, mu, logvar, log_weight; and stats
  Options of;
  auto options() const {
    return std::make_tuple(of.dataset_size, static_cast<int64_t>(of.estimator), static_cast<int64_t>(of.of),
                           static_cast<int64_t>(of.reduction));
  }

  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    static const auto forward = find_op<decltype(with_stats)>("fastvae::_pairwise");
    static const auto op = find_op<decltype(gradients)>("fastvae::_pairwise_gradients");
    const auto& [z, mu, logvar, weight, stats] = saved;
    const auto [size, estimator, terms, reduction] = options();
    const Tensor left =
        stats.defined() ? stats
                        : std::get<3>(forward.call(z, mu, logvar, optional(weight), size, estimator, terms, reduction));
    return placed(op.call(optional(g[0]), optional(g[1]), optional(g[2]), z, mu, logvar, optional(weight), left, size,
                          estimator, terms, reduction, wants),
                  wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    return composed_gradients(g, of, saved[0], saved[1], saved[2], saved[3], wants);
  }
};

std::tuple<Tensor, Tensor, Tensor> autograd(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                            const OptionalTensor& log_weight, double dataset_size, int64_t estimator,
                                            int64_t of, int64_t reduction) {
  static const auto value_op = find_op<decltype(pairwise)>("fastvae::pairwise");
  static const auto with_stats_op = find_op<decltype(with_stats)>("fastvae::_pairwise");
  const std::array<Tensor, 4> inputs{z, mu, logvar, or_undefined(log_weight)};
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return composed(z, mu, logvar, log_weight, dataset_size, estimator, of, reduction);
  const bool differentiate = torch::autograd::compute_requires_grad(z, mu, logvar, log_weight);
  Tensor out[3], stats;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (differentiate && std::none_of(inputs.begin(), inputs.end(), is_transformed)) {
      std::tie(out[0], out[1], out[2], stats) =
          with_stats_op.call(z, mu, logvar, log_weight, dataset_size, estimator, of, reduction);
    } else {
      std::tie(out[0], out[1], out[2]) =
          value_op.call(z, mu, logvar, log_weight, dataset_size, estimator, of, reduction);
    }
  }
  if (differentiate) {
    const auto node =
        record(Pairwise{options_of(dataset_size, estimator, of, reduction)}, inputs, {z, mu, logvar, inputs[3], stats});
    for (Tensor& t : out) torch::autograd::set_history(t, node);
  }
  return {out[0], out[1], out[2]};
}

#define FASTVAE_INPUTS "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weight, "
#define FASTVAE_OPTIONS "float dataset_size, int estimator, int of, int reduction"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("pairwise(" FASTVAE_INPUTS FASTVAE_OPTIONS ") -> (Tensor, Tensor, Tensor)", kPure);
  m.def("_pairwise(" FASTVAE_INPUTS FASTVAE_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)", kPure);
  m.def("_pairwise_gradients(Tensor? g0, Tensor? g1, Tensor? g2, " FASTVAE_INPUTS "Tensor stats, " FASTVAE_OPTIONS
        ", bool[4] wants) -> Tensor[]",
        kPure);
  m.def("pairwise_composed(" FASTVAE_INPUTS FASTVAE_OPTIONS ") -> (Tensor, Tensor, Tensor)", composed, kPure);
  implement(m, "pairwise", pairwise);
  implement_elsewhere(m, "pairwise", composed);
  implement_inner(m, "_pairwise", with_stats);
  implement_inner(m, "_pairwise_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("pairwise", autograd); }

}  // namespace fastvae
