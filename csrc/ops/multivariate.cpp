// Gaussians with full covariance (csrc/multivariate): the samples and the KL divergence from N(0, I) are one op.
#include "../multivariate/multivariate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/tril_indices.h>
#include <ATen/ops/zeros_like.h>

#include "composed.h"
#include "elements.h"

namespace fastvae {
namespace {

bool is_packed(const Tensor& mu, const Tensor& scale_tril) { return scale_tril.dim() == mu.dim(); }

// fastvae/multivariate.py has checked dtypes and shapes too, for its messages.
void check(const Tensor& mu, const Tensor& scale_tril, const OptionalTensor& eps) {
  const char* op = eps.has_value() ? "fastvae.sample_and_kl_multivariate_normal" : "fastvae.kl_multivariate_normal";
  check_tensor(op, "mu", mu);
  check_batch(op, "mu", mu);
  check_tensor(op, "scale_tril", scale_tril);
  check_same_device(op, "mu", mu, "scale_tril", scale_tril);
  check_same_arithmetic(op, "mu", mu, "scale_tril", scale_tril);
  auto shape = mu.sym_sizes().vec();
  const c10::SymInt length = shape.back();
  if (is_packed(mu, scale_tril)) {
    shape.back() = length * (length + 1) / 2;
  } else {
    shape.push_back(length);
  }
  TORCH_CHECK_VALUE(scale_tril.sym_sizes() == c10::SymIntArrayRef(shape), op, ": scale_tril must be ",
                    c10::SymIntArrayRef(shape), " beside mu ", mu.sym_sizes(), ", but got ", scale_tril.sym_sizes());
  if (!eps.has_value()) return;
  check_noise(op, mu, eps, std::nullopt);
}

// ---- On the devices, and Meta.

Tensor ready(const Tensor& t, at::ScalarType dtype) { return t.to(dtype).contiguous(); }

// The arguments, for tensors that are ready.
MultivariateArgs args_of(const Tensor& mu, const Tensor& scale_tril, const Tensor& eps, const Tensor& kl,
                         Reduction reduction) {
  MultivariateArgs args;
  args.dims = mu.size(-1);
  args.rows = 1;
  for (int64_t d = 0; d + 1 < mu.dim(); ++d) args.rows *= mu.size(d);
  args.float64 = mu.scalar_type() == at::kDouble;
  args.packed = is_packed(mu, scale_tril);
  args.mu = mu.const_data_ptr();
  args.scale_tril = scale_tril.const_data_ptr();
  if (eps.defined()) args.eps = eps.const_data_ptr();
  args.kl = sums_of(kl, reduction, mu);
  return args;
}

std::tuple<Tensor, Tensor> multivariate_normal(const Tensor& mu, const Tensor& scale_tril, const OptionalTensor& eps,
                                               int64_t reduction) {
  check(mu, scale_tril, eps);
  const auto r = static_cast<Reduction>(reduction);
  const auto dtype = result_type(mu);
  Tensor kl = empty_result(r, mu);
  Tensor z = eps.has_value() ? at::empty_symint(mu.sym_sizes(), kl.options()) : at::empty({0}, kl.options());
  if (!mu.is_meta()) {
    const Tensor m = ready(mu, dtype), t = ready(scale_tril, dtype),
                 e = eps.has_value() ? ready(*eps, dtype) : Tensor();
    MultivariateArgs args = args_of(m, t, e, kl, r);
    if (eps.has_value()) args.z = z.data_ptr();
    run_multivariate(mu, args, /*backward=*/false);
  }
  z = z.to(c10::promoteTypes(mu.scalar_type(), scale_tril.scalar_type()));
  if (eps.has_value() && !mu.is_contiguous()) z = at::empty_like(mu, z.options()).copy_(z);  // with mu's strides
  return {z, kl};
}

std::vector<Tensor> gradients(const OptionalTensor& g_z, const OptionalTensor& g_kl, const Tensor& mu,
                              const Tensor& scale_tril, const OptionalTensor& eps, int64_t reduction,
                              std::array<bool, 3> wants) {
  const auto dtype = result_type(mu);
  const Tensor* inputs[] = {&mu, &scale_tril, eps.has_value() ? &*eps : nullptr};
  std::array<Tensor, 3> d;
  for (int k = 0; k < 3; ++k) {
    if (wants[k]) d[k] = at::empty_symint(inputs[k]->sym_sizes(), inputs[k]->options().dtype(dtype));
  }
  if (!mu.is_meta()) {
    const auto data = [&](const OptionalTensor& t) { return t.has_value() ? ready(*t, dtype) : Tensor(); };
    const Tensor m = ready(mu, dtype), t = ready(scale_tril, dtype), e = data(eps), dz = data(g_z), g = data(g_kl);
    MultivariateArgs args = args_of(m, t, e, g, static_cast<Reduction>(reduction));
    if (dz.defined() && e.defined()) args.dz = dz.const_data_ptr();
    if (g.defined()) args.g = g.const_data_ptr();
    void** to[] = {&args.dmu, &args.dscale_tril, &args.deps};
    for (int k = 0; k < 3; ++k) *to[k] = wants[k] ? d[k].data_ptr() : nullptr;
    run_multivariate(mu, args, /*backward=*/true);
  }
  for (int k = 0; k < 3; ++k) {
    if (wants[k]) d[k] = d[k].to(inputs[k]->scalar_type());
  }
  return defined_only(d);
}

// ---- In aten ops.

struct Parts {
  Tensor mu, factor, eps;  // in the arithmetic's type; [..., L], [..., L, L], [..., L] or undefined
  Tensor diagonal, slope;  // [..., L] what the diagonal adds to the KL, and its derivative
};

template <class S>
std::pair<Tensor, Tensor> diagonal_of(const Tensor& factor) {
  const auto term = diagonal_term(Elements<S>(factor.diagonal(0, -2, -1)));
  return {term.value.tensor, term.d.tensor};
}

Parts parts_of(const Tensor& mu, const Tensor& scale_tril, const Tensor& eps) {
  Parts p{widened(mu), widened(scale_tril), {}, {}, {}};
  if (eps.defined()) p.eps = eps.to(p.mu.scalar_type());
  if (is_packed(mu, scale_tril)) {
    const auto i = at::arange(mu.sym_size(-1), scale_tril.options().dtype(at::kLong));
    const Tensor place = at::tril((i * (i + 1)).floor_divide(2).unsqueeze(1) + i);
    auto shape = mu.sym_sizes().vec();
    shape.push_back(shape.back());
    p.factor = p.factor.index_select(-1, place.reshape(-1)).reshape_symint(shape);
  }
  p.factor = at::tril(p.factor);
  std::tie(p.diagonal, p.slope) =
      p.mu.scalar_type() == at::kDouble ? diagonal_of<double>(p.factor) : diagonal_of<float>(p.factor);
  return p;
}

std::tuple<Tensor, Tensor> composed(const Tensor& mu, const Tensor& scale_tril, const OptionalTensor& eps,
                                    int64_t reduction) {
  check(mu, scale_tril, eps);
  const Parts p = parts_of(mu, scale_tril, or_undefined(eps));
  const Tensor squares = p.mu * p.mu + at::tril(p.factor, -1).square().sum(-1);
  const Tensor kl = reduced(0.5 * squares + p.diagonal, static_cast<Reduction>(reduction), {});
  const Tensor z = eps.has_value() ? p.mu + (p.factor * p.eps.unsqueeze(-2)).sum(-1) : at::empty({0}, p.mu.options());
  return {z.to(c10::promoteTypes(mu.scalar_type(), scale_tril.scalar_type())), kl};
}

// The gradients of composed() (multivariate.h), differentiable.
variable_list composed_gradients(const variable_list& g, Reduction reduction, const Tensor& mu,
                                 const Tensor& scale_tril, const Tensor& eps, const Wants<3>& wants) {
  const Parts p = parts_of(mu, scale_tril, eps);
  const bool moves = g[0].defined() && eps.defined();
  const Tensor dz = moves ? g[0].to(p.mu.scalar_type()) : at::zeros_like(p.mu);
  const Tensor of_kl = g[1].defined() ? spread(g[1], reduction, mu, {}) : Tensor();
  variable_list d(3);
  if (wants[0]) d[0] = (of_kl.defined() ? dz + of_kl * p.mu : dz).to(mu.scalar_type());
  if (wants[1]) {
    Tensor t = moves ? at::tril(dz.unsqueeze(-1) * p.eps.unsqueeze(-2)) : at::zeros_like(p.factor);
    if (of_kl.defined()) t = t + of_kl.unsqueeze(-1) * at::tril(p.factor, -1) + at::diag_embed(of_kl * p.slope);
    if (is_packed(mu, scale_tril)) {
      const int64_t length = mu.sym_size(-1).guard_int(__FILE__, __LINE__);
      const Tensor at = at::tril_indices(length, length, 0, scale_tril.options().dtype(at::kLong));
      auto shape = mu.sym_sizes().vec();
      shape.back() = length * length;
      t = t.reshape_symint(shape).index_select(-1, at.select(0, 0) * length + at.select(0, 1));
    }
    d[1] = t.to(scale_tril.scalar_type());
  }
  if (wants[2]) d[2] = (moves ? (p.factor * dz.unsqueeze(-1)).sum(-2) : dz).to(eps.scalar_type());
  return d;
}

// ---- Autograd.

struct Multivariate {
  static constexpr const char* kName = "FastvaeMultivariateNormalBackward";
  static constexpr int kInputs = 3, kSaved = 3;  // mu, scale_tril, eps
  int64_t reduction;
  auto options() const { return std::make_tuple(reduction); }

  variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                         const Wants<kInputs>& wants) const {
    static const auto op = find_op<decltype(gradients)>("fastvae::_multivariate_normal_gradients");
    const auto& [mu, scale_tril, eps] = saved;
    return placed(op.call(optional(g[0]), optional(g[1]), mu, scale_tril, optional(eps), reduction, wants), wants);
  }
  variable_list differentiable_backward(const variable_list& g, const std::array<Tensor, kSaved>& saved,
                                        const Wants<kInputs>& wants) const {
    return composed_gradients(g, static_cast<Reduction>(reduction), saved[0], saved[1], saved[2], wants);
  }
};

std::tuple<Tensor, Tensor> autograd(const Tensor& mu, const Tensor& scale_tril, const OptionalTensor& eps,
                                    int64_t reduction) {
  static const auto op = find_op<decltype(multivariate_normal)>("fastvae::multivariate_normal");
  const std::array<Tensor, 3> inputs{mu, scale_tril, or_undefined(eps)};
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent)) return composed(mu, scale_tril, eps, reduction);
  Tensor z, kl;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(z, kl) = op.call(mu, scale_tril, eps, reduction);
  }
  if (torch::autograd::compute_requires_grad(mu, scale_tril, eps)) {
    const auto node = record(Multivariate{reduction}, inputs, inputs);
    torch::autograd::set_history(z, node);
    torch::autograd::set_history(kl, node);
  }
  return {z, kl};
}

#define FASTVAE_INPUTS "Tensor mu, Tensor scale_tril, Tensor? eps, int reduction"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("multivariate_normal(" FASTVAE_INPUTS ") -> (Tensor, Tensor)", kPure);
  m.def("_multivariate_normal_gradients(Tensor? g_z, Tensor? g_kl, " FASTVAE_INPUTS ", bool[3] wants) -> Tensor[]",
        kPure);
  m.def("multivariate_normal_composed(" FASTVAE_INPUTS ") -> (Tensor, Tensor)", composed, kPure);
  implement(m, "multivariate_normal", multivariate_normal);
  implement_elsewhere(m, "multivariate_normal", composed);
  implement_inner(m, "_multivariate_normal_gradients", gradients);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("multivariate_normal", autograd); }

}  // namespace fastvae
