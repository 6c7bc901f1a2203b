// Tensors as the type T of formulas. A formula is then a chain of aten ops, one for each of its operations. The chain
// is slow unless a compiler fuses it, and differentiable.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/where.h>

#include "../formulas/negative_binomial.h"

namespace fastvae {

template <class S>  // float or double, as the tensor's dtype
struct Elements {
  at::Tensor tensor;  // undefined: a constant
  S constant = 0;
  Elements() = default;
  explicit Elements(S x) : constant(x) {}
  explicit Elements(at::Tensor t) : tensor(std::move(t)) {}
};

template <class S>
struct Traits<Elements<S>> {
  using Scalar = S;
};

// op(a, b), where one of a and b may be a constant.
template <class S, class Op>
auto combine(const Elements<S>& a, const Elements<S>& b, Op op) {
  if (!a.tensor.defined()) return op(at::Scalar(a.constant), b.tensor);
  return b.tensor.defined() ? op(a.tensor, b.tensor) : op(a.tensor, at::Scalar(b.constant));
}

#define FASTVAE_BINARY(op)                                                                        \
  template <class S>                                                                              \
  Elements<S> operator op(const Elements<S>& a, const Elements<S>& b) {                           \
    if (!a.tensor.defined() && !b.tensor.defined()) return Elements<S>(a.constant op b.constant); \
    return Elements<S>(combine(a, b, [](const auto& x, const auto& y) { return x op y; }));       \
  }
FASTVAE_BINARY(+)
FASTVAE_BINARY(-)
FASTVAE_BINARY(*)
FASTVAE_BINARY(/)
#undef FASTVAE_BINARY

#define FASTVAE_COMPARE(op)                                                                                        \
  template <class S>                                                                                               \
  at::Tensor operator op(const Elements<S>& a, const Elements<S>& b) {                                             \
    if (!a.tensor.defined() && !b.tensor.defined()) return at::scalar_tensor(a.constant op b.constant, at::kBool); \
    return combine(a, b, [](const auto& x, const auto& y) { return x op y; });                                     \
  }
FASTVAE_COMPARE(>)
FASTVAE_COMPARE(<)
FASTVAE_COMPARE(==)
FASTVAE_COMPARE(!=)
#undef FASTVAE_COMPARE

template <class S>
Elements<S> operator-(const Elements<S>& a) {
  return a.tensor.defined() ? Elements<S>(at::neg(a.tensor)) : Elements<S>(-a.constant);
}

template <class S>
Elements<S> select(const at::Tensor& condition, const Elements<S>& yes, const Elements<S>& no) {
  const auto full = [&](const Elements<S>& e) {
    return e.tensor.defined()
               ? e.tensor
               : at::scalar_tensor(e.constant, condition.options().dtype(c10::CppTypeToScalarType<S>::value));
  };
  return Elements<S>(at::where(condition, full(yes), full(no)));
}
template <class S>
bool any_of(const at::Tensor&, const Elements<S>&) {  // only the device knows the condition
  return true;
}
template <class S>
Elements<S> guarded(const at::Tensor& condition, const Elements<S>& x) {
  return select(condition, x, Elements<S>(S(0)));
}

#define FASTVAE_FUNCTION(name, function)                                                             \
  template <class S>                                                                                 \
  Elements<S> name(const Elements<S>& x) {                                                           \
    return x.tensor.defined() ? Elements<S>(at::function(x.tensor)) : Elements<S>(name(x.constant)); \
  }
FASTVAE_FUNCTION(exponential, exp)
FASTVAE_FUNCTION(exponential_of_negative, exp)
FASTVAE_FUNCTION(exponential_of_normal, exp)
FASTVAE_FUNCTION(square_root, sqrt)
FASTVAE_FUNCTION(logarithm, log)
FASTVAE_FUNCTION(log1p, log1p)
FASTVAE_FUNCTION(log1p_of_fraction, log1p)
FASTVAE_FUNCTION(logarithm_of_probability, log)
#undef FASTVAE_FUNCTION
// Its derivative at 0 is 1, as where the formulas' `x < 0` is false. That of at::abs is 0.
template <class S>
Elements<S> absolute(const Elements<S>& x) {
  return x.tensor.defined() ? select(x < Elements<S>(S(0)), -x, x) : Elements<S>(absolute(x.constant));
}
template <class S>
Elements<S> logarithm_of_complement(const Elements<S>& p) {
  return log1p(-p);
}

template <class S>
Elements<S> quotient(const Elements<S>& a, const Elements<S>& b) {
  return a / b;
}
template <class S>
Elements<S> multiply_add(const Elements<S>& a, const Elements<S>& b, const Elements<S>& c) {
  return a * b + c;
}
template <class S>
LogParts<Elements<S>> log_parts(const Elements<S>& whole, const Elements<S>& f) {
  const at::Tensor near = absolute(f) < Elements<S>(S(0.25));
  const Elements<S> inside = guarded(near, f), square = inside * inside;
  const Elements<S> log = select(near, log1p(inside), logarithm(select(near, Elements<S>(S(1)), whole)));
  return {log, select(near, -(square * Constants<S>::log_polynomial(inside)), f - log)};
}

template <class S>
LogParts<Elements<S>> log_parts_of_probability(const Elements<S>& whole, const Elements<S>& f) {
  return log_parts(whole, f);
}

template <class S>
ExpWithExpm1<Elements<S>> exp_with_expm1(const Elements<S>& x) {
  return {Elements<S>(at::exp(x.tensor)), Elements<S>(at::expm1(x.tensor))};
}

template <class S>  // its derivative is 0
Elements<S> lost_at_zero(const Elements<S>&, const Elements<S>&, const Elements<S>&) {
  return Elements<S>(S(0));
}

}  // namespace fastvae
