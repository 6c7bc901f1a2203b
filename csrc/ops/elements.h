// Tensors as the numbers that csrc/math's formulas are written in. A formula is then a chain of aten ops, one for each
// of its operations: slow by itself, and fused by a compiler.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include "../math/scalar.h"
#include "common.h"

namespace fastvae {

template <class S>  // float or double, as the tensor's dtype
struct Elements {
  Tensor tensor;  // undefined: a constant
  S constant = 0;
  explicit Elements(S x) : constant(x) {}
  explicit Elements(Tensor t) : tensor(std::move(t)) {}
};

template <class S>
struct Traits<Elements<S>> {
  using Scalar = S;
};

// op of two, one of which may be a constant.
template <class S, class Op>
auto combine(const Elements<S>& a, const Elements<S>& b, Op op) {
  if (!a.tensor.defined()) return op(at::Scalar(a.constant), b.tensor);
  return b.tensor.defined() ? op(a.tensor, b.tensor) : op(a.tensor, at::Scalar(b.constant));
}

template <class S>
Elements<S> operator+(const Elements<S>& a, const Elements<S>& b) {
  return Elements<S>(combine(a, b, [](const auto& x, const auto& y) { return x + y; }));
}
template <class S>
Elements<S> operator-(const Elements<S>& a, const Elements<S>& b) {
  return Elements<S>(combine(a, b, [](const auto& x, const auto& y) { return x - y; }));
}
template <class S>
Elements<S> operator*(const Elements<S>& a, const Elements<S>& b) {
  return Elements<S>(combine(a, b, [](const auto& x, const auto& y) { return x * y; }));
}
template <class S>
Tensor operator>(const Elements<S>& a, const Elements<S>& b) {
  return combine(a, b, [](const auto& x, const auto& y) { return x > y; });
}
template <class S>
Tensor operator<(const Elements<S>& a, const Elements<S>& b) {
  return combine(a, b, [](const auto& x, const auto& y) { return x < y; });
}
template <class S>
Elements<S> select(const Tensor& condition, const Elements<S>& yes, const Elements<S>& no) {
  return Elements<S>(at::where(condition, yes.tensor, no.tensor));
}

}  // namespace fastvae
