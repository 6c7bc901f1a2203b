// What a pass does around a formula, for one element: the activation before it, the scale of the data, a constant, free
// bits and a weight. Each is the identity unless it was asked for.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
struct Extras {
  T number[3];  // the formula's own constants
  Activation activation = Activation::none;
  bool has_scale = false, has_constant = false, has_floor = false;
  T x_scale, constant, floor;
};

// F::at, given exp(logvar) where F has use for it and the pass has it (`variance`; nullptr: it has not).
template <class F, class T, int n>
FASTVAE_INLINE Terms<T, n> at(const T (&in)[n], const T* number, const T* variance) {
  if constexpr (F::kUsesVariance) {
    if (variance != nullptr) return F::at(in, number, *variance);
  }
  return F::at(in, number);
}

// `weight` is nullptr where there is none.
template <class F, class T, int n>
FASTVAE_INLINE Terms<T, n> element(T (&in)[n], const Extras<T>& extras, const T* weight, const T* variance) {
  static_assert(n == kInputsOf<F>, "a formula gets its own inputs");
  T slope;
  if constexpr (F::kHasMean) {
    if (extras.activation != Activation::none) {
      const Activated<T> mean = extras.activation == Activation::sigmoid ? sigmoid(in[0]) : hyperbolic_tangent(in[0]);
      in[0] = mean.value;
      slope = mean.slope;
    }
  }
  constexpr bool kHasData = F::kInputs[1].role == kData;
  if constexpr (kHasData) {
    if (extras.has_scale) in[1] = in[1] * extras.x_scale;
  }
  Terms<T, n> terms = at<F>(in, extras.number, variance);
  if constexpr (F::kHasMean) {
    if (extras.activation != Activation::none) terms.d[0] = terms.d[0] * slope;
  }
  if constexpr (kHasData) {
    if (extras.has_scale) terms.d[1] = terms.d[1] * extras.x_scale;
    if (extras.has_constant) terms.value = terms.value + extras.constant;
  } else {
    if (extras.has_floor) {
      const auto below = terms.value < extras.floor;  // a NaN is not
      terms.value = select(below, extras.floor, terms.value);
      FASTVAE_UNROLL
      for (int i = 0; i < n; ++i) terms.d[i] = select(below, T(0), terms.d[i]);
    }
  }
  if (weight != nullptr) {  // not multiplied where it is 0: the element may be NaN
    const T zero(0);
    const auto absent = *weight == zero;
    terms.value = select(absent, zero, *weight * terms.value);
    FASTVAE_UNROLL
    for (int i = 0; i < n; ++i) terms.d[i] = select(absent, zero, *weight * terms.d[i]);
  }
  return terms;
}

FASTVAE_NAMESPACE_END
