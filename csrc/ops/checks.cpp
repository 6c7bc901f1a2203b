#include "checks.h"

#include <ATen/ExpandUtils.h>
#include <c10/core/ScalarType.h>

#include <utility>

namespace fastvae {

std::string dtype_name(const Tensor& t) { return std::string(c10::getDtypeNames(t.scalar_type()).first); }

bool is_supported(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

bool is_supported_integer(at::ScalarType t) {
  return t == at::kByte || t == at::kBool || t == at::kChar || t == at::kShort || t == at::kInt || t == at::kLong;
}

namespace {

const char* how_to_convert(std::string_view name, at::ScalarType t) {
  if (c10::isComplexType(t)) return "convert it with .real";
  if (name == "recon_x" && t == at::kByte)
    return "convert pixels in 0..255 with .float() / 255, and other numbers with .float()";
  return "convert it with .float()";
}

// Advice for a tensor that would have to be broadcast; empty if it cannot be broadcast.
std::string how_to_expand(const char* name, const Tensor& t, const char* to_name, const Tensor& to) {
  if (!at::is_expandable_to(t.sym_sizes(), to.sym_sizes())) return "";
  return c10::str("; give a shared ", name, " as ", name, ".expand_as(", to_name,
                  "), which is read in place, not copied");
}

}  // namespace

void check_dtype(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(is_supported(t.scalar_type()), op, ": ", name,
                   " must be float32, float64, bfloat16 or float16, but its dtype is ", dtype_name(t), "; ",
                   how_to_convert(name, t.scalar_type()));
}

void check_tensor(const char* op, const char* name, const Tensor& t, bool may_be_integer) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a tensor, but got None");
  if (!may_be_integer || !is_supported_integer(t.scalar_type())) check_dtype(op, name, t);
  TORCH_CHECK(!t.is_neg() && !t.is_conj(), op, ": ", name,
              " must not be a lazily negated or conjugated view; call .resolve_neg() on it");
#if !defined(FASTVAE_CUDA)
  TORCH_CHECK(!t.is_cuda(), op, ": ", name, " is on ", t.device(), ", but this fastvae was built without CUDA; ",
              kHowToGetCuda);
#endif
  if (!t.is_cpu() && !t.is_cuda() && !t.is_meta()) {
    TORCH_WARN_ONCE("fastvae has no kernels for ", t.device().type(),
                    ": there it computes with torch's own operations, and draws torch's noise");
  }
}

void check_batch(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() > 0, op, ": ", name, " must have a batch dimension, but it is a 0-dim tensor; give ", name,
                    ".reshape(1)");
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(t.sym_sizes() == other.sym_sizes(), op, ": ", name, " and ", other_name,
                    " must have the same shape, but got ", t.sym_sizes(), " and ", other.sym_sizes(),
                    how_to_expand(name, t, other_name, other), how_to_expand(other_name, other, name, t));
}

void check_broadcasts(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  bool fits = t.dim() <= other.dim();
  for (int64_t d = 1; fits && d <= t.dim(); ++d) fits = t.sym_size(-d) == other.sym_size(-d) || t.sym_size(-d) == 1;
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must broadcast to ", other_name, "'s shape ", other.sym_sizes(),
                    ", but got ", t.sym_sizes());
}

void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK(t.device() == other.device(), op, ": ", name, " and ", other_name,
              " must be on the same device, but got ", t.device(), " and ", other.device());
}

void check_same_arithmetic(const char* op, const char* name, const Tensor& t, const char* other_name,
                           const Tensor& other) {
  TORCH_CHECK_TYPE((t.scalar_type() == at::kDouble) == (other.scalar_type() == at::kDouble), op,
                   ": float64 goes with float64 only, but ", name, " and ", other_name, " are ", dtype_name(t), " and ",
                   dtype_name(other), "; convert one of them");
}

void check_posterior(const char* op, const Tensor& mu, const Tensor& logvar) {
  check_tensor(op, "mu", mu);
  check_batch(op, "mu", mu);
  check_tensor(op, "logvar", logvar);
  check_same_device(op, "mu", mu, "logvar", logvar);
  check_same_shape(op, "mu", mu, "logvar", logvar);
  check_same_arithmetic(op, "mu", mu, "logvar", logvar);
}

void check_prior(const char* op, const Tensor& mu, const OptionalTensor& mu_p, const OptionalTensor& logvar_p) {
  const bool has_mu_p = mu_p.has_value() && mu_p->defined(), has_logvar_p = logvar_p.has_value() && logvar_p->defined();
  TORCH_CHECK_VALUE(has_mu_p == has_logvar_p, op, ": a prior needs both mu_p and logvar_p, but only ",
                    has_mu_p ? "mu_p" : "logvar_p", " was given; give both, or neither for N(0, 1)");
  if (!has_mu_p) return;
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("mu_p", *mu_p), {"logvar_p", *logvar_p}}) {
    // The shape is checked first: a learned prior is often a vector, or a number.
    TORCH_CHECK_VALUE(t.sym_sizes() == mu.sym_sizes(), op, ": ", name, " must have mu's shape ", mu.sym_sizes(),
                      ", but got ", t.sym_sizes(), how_to_expand(name, t, "mu", mu));
    check_tensor(op, name, t);
    check_same_device(op, name, t, "mu", mu);
    check_same_arithmetic(op, name, t, "mu", mu);
  }
}

void check_weight(const char* op, const Tensor& weight, const char* other_name, const Tensor& other) {
  check_dtype(op, "weight", weight);
  check_same_device(op, "weight", weight, other_name, other);
  check_broadcasts(op, "weight", weight, other_name, other);
  TORCH_CHECK_VALUE(!weight.requires_grad(), op,
                    ": weight must not require a gradient, as none is computed for it; give weight.detach()");
}

void check_noise(const char* op, const Tensor& mu, const OptionalTensor& eps,
                 const std::optional<at::Generator>& generator) {
  if (eps.has_value() && eps->defined()) {
    check_tensor(op, "eps", *eps);
    check_same_device(op, "eps", *eps, "mu", mu);
    check_same_shape(op, "eps", *eps, "mu", mu);
    TORCH_CHECK_VALUE(!generator.has_value(), op,
                      ": got both eps and generator, but with eps given nothing is drawn; give one of them");
  }
  if (generator.has_value() && generator->defined()) {
    TORCH_CHECK(mu.is_meta() || generator->device() == mu.device(), op, ": generator must be on mu's device ",
                mu.device(), ", but it is on ", generator->device());
  }
}

}  // namespace fastvae
