#include "common.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

namespace fastvae {

std::string dtype_name(const Tensor& t) { return std::string(c10::getDtypeNames(t.scalar_type()).first); }

namespace {

const char* const kReductions[] = {"sum", "batchmean", "mean", "sample", "none"};

bool is_supported(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

const char* how_to_convert(std::string_view name, at::ScalarType t) {
  if (c10::isComplexType(t)) return "convert it with .real";
  const bool image = name == "x" || name == "recon_x";
  if (image && t == at::kByte) return "convert pixels in 0..255 with .float() / 255, and other numbers with .float()";
  if (image && t != at::kBool && c10::isIntegralType(t, /*includeBool=*/false))
    return "convert it with .float(), and divide pixels by the largest value that they can have";
  return "convert it with .float()";
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kFloat:
      return DType::float32;
    default:
      TORCH_INTERNAL_ASSERT(false, "fastvae: no kernel reads ", dtype_name(t), ", and no check has refused it");
  }
}

View merged(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  View view;
  view.data = const_cast<void*>(t.const_data_ptr());  // not data_ptr: that would copy a lazy clone that is only read
  view.dtype = dtype_of(t);
  // From the innermost dimension outwards, then turned round.
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    const int last = view.dims - 1;
    if (last >= 0 && strides[d] == view.stride[last] * view.size[last]) {
      view.size[last] *= sizes[d];
      continue;
    }
    TORCH_CHECK_VALUE(view.dims < kMaxDims, "fastvae: a tensor of shape ", sizes, " and strides ", strides,
                      " has more than ", kMaxDims,
                      " dimensions that do not lie behind one another in memory; call .contiguous() on it first");
    view.size[view.dims] = sizes[d];
    view.stride[view.dims++] = strides[d];
  }
  if (view.dims == 0) {
    view.dims = 1;
    view.size[0] = view.stride[0] = 1;
  }
  std::reverse(view.size, view.size + view.dims);
  std::reverse(view.stride, view.stride + view.dims);
  return view;
}

View ordered(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef order) {
  if (order.empty()) return merged(t, sizes, strides);
  c10::SmallVector<int64_t, 8> permuted_sizes, permuted_strides;
  for (const int64_t d : order) {
    permuted_sizes.push_back(sizes[d]);
    permuted_strides.push_back(strides[d]);
  }
  return merged(t, permuted_sizes, permuted_strides);
}

// What to do about a tensor that would have to be broadcast; nothing if it cannot be.
std::string how_to_expand(const char* name, const Tensor& t, const char* to_name, const Tensor& to) {
  if (!at::is_expandable_to(t.sym_sizes(), to.sym_sizes())) return "";
  return c10::str("; give a shared ", name, " as ", name, ".expand_as(", to_name,
                  "), which is read in place, not copied");
}

}  // namespace

Reduction parse_reduction(const char* op, c10::string_view name, const char* argument, bool allow_none) {
  for (int r = 0; r < (allow_none ? 5 : 4); ++r) {
    if (name == kReductions[r]) return static_cast<Reduction>(r);
  }
  TORCH_CHECK_VALUE(false, op, ": ", argument, " must be \"sum\", \"batchmean\", \"mean\"",
                    allow_none ? ", \"sample\" or \"none\"" : " or \"sample\"", ", but got \"", name, "\"");
}

void check_dtype(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(is_supported(t.scalar_type()), op, ": ", name,
                   " must be float32, float64, bfloat16 or float16, but its dtype is ", dtype_name(t), "; ",
                   how_to_convert(name, t.scalar_type()));
}

void check_tensor(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a tensor, but got None");
  check_dtype(op, name, t);
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
    // A shape first: a learned prior is often a vector, or a number.
    TORCH_CHECK_VALUE(t.sym_sizes() == mu.sym_sizes(), op, ": ", name, " must have mu's shape ", mu.sym_sizes(),
                      ", but got ", t.sym_sizes(), how_to_expand(name, t, "mu", mu));
    check_tensor(op, name, t);
    check_same_device(op, name, t, "mu", mu);
    check_same_arithmetic(op, name, t, "mu", mu);
  }
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

c10::SymInt divisor(Reduction r, const Tensor& like) {
  if (r == Reduction::batchmean) return like.sym_size(0);
  if (r == Reduction::mean) return like.sym_numel();
  return 1;
}

double divisor_value(Reduction r, const Tensor& like) {
  if (r == Reduction::batchmean) return static_cast<double>(like.size(0));
  if (r == Reduction::mean) return static_cast<double>(like.numel());
  return 1;
}

at::ScalarType result_type(const Tensor& like) { return like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor empty_result(Reduction r, const Tensor& like) {
  const auto options = like.options().dtype(result_type(like));
  if (r == Reduction::none) return at::empty_like(like, options);
  if (r == Reduction::sample) return at::empty_symint({like.sym_size(0)}, options);
  return at::empty({}, options);
}

Tensor spread(const Tensor& g, Reduction r, const Tensor& like) {
  if (r == Reduction::none) return g;
  if (r == Reduction::sample) {
    std::vector<c10::SymInt> shape(like.dim(), 1);
    shape[0] = like.sym_size(0);
    return g.reshape_symint(shape);
  }
  return r == Reduction::sum ? g : at::div(g, at::Scalar(divisor(r, like)));
}

Tensor reduced(const Tensor& value, Reduction r) {
  if (!value.defined() || r == Reduction::none) return value;
  if (r == Reduction::sample) {
    std::vector<int64_t> event;
    for (int64_t d = 1; d < value.dim(); ++d) event.push_back(d);
    return event.empty() ? value : value.sum(event);
  }
  return r == Reduction::sum ? value.sum() : at::div(value.sum(), at::Scalar(divisor(r, value)));
}

Tensor widened(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }

std::vector<int64_t> memory_order(at::ArrayRef<Tensor> operands, bool keep_batch) {
  for (const Tensor& t : operands) {
    if (!t.defined()) continue;
    if (t.is_contiguous()) return {};
    bool expanded = false;
    for (int64_t d = 0; d < t.dim(); ++d) expanded |= t.stride(d) == 0 && t.size(d) > 1;
    if (expanded) continue;
    std::vector<int64_t> order(t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) order[d] = d;
    std::stable_sort(order.begin() + (keep_batch ? 1 : 0), order.end(),
                     [&](int64_t i, int64_t j) { return t.stride(i) > t.stride(j); });
    return order;
  }
  return {};
}

View view_of(const Tensor& t, at::IntArrayRef order) {
  return t.defined() ? ordered(t, t.sizes(), t.strides(), order) : View();
}

View upstream_view(const Tensor& g, Reduction r, const Tensor& like, at::IntArrayRef order) {
  if (!g.defined()) return View();
  if (r == Reduction::none) return view_of(g, order);
  c10::SmallVector<int64_t, 8> strides(like.dim(), 0);
  if (r == Reduction::sample) strides[0] = g.stride(0);
  return ordered(g, like.sizes(), strides, order);
}

Number number_of(const OptionalTensor& t) {
  Number number;
  if (!t.has_value() || t->is_meta()) return number;
  number.data = t->const_data_ptr();
  number.dtype = dtype_of(*t);
  return number;
}

Sums sums_of(const Tensor& result, Reduction r, const Tensor& like) {
  Sums sums;
  if (!result.defined() || r == Reduction::none) return sums;
  sums.data = result.data_ptr();
  sums.float64 = result.scalar_type() == at::kDouble;
  if (r == Reduction::sample) {
    sums.count = like.size(0);
    sums.event = sums.count > 0 ? like.numel() / sums.count : 0;
  }
  sums.divisor = divisor_value(r, like);
  return sums;
}

Tensor empty_gradient(bool wanted, const Tensor& of) { return wanted ? at::empty_like(of) : Tensor(); }

std::vector<Tensor> defined_only(std::initializer_list<Tensor> tensors) {
  std::vector<Tensor> list;
  for (const Tensor& t : tensors) {
    if (t.defined()) list.push_back(t);
  }
  return list;
}

}  // namespace fastvae
