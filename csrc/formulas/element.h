// What a pass does around a formula, for one element. Before it: the activation of the mean, or the conversion and the
// clamp of a Gaussian's logvar; the scale of the data. After it: a constant, free bits and a weight. Each is optional.
#pragma once

#include "../kernels.h"
#include "sample.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
struct Extras {
  using S = ScalarOf<T>;
  T number[kMaxNumbers];  // the formula's own constants
  int transform = 0;      // the mean's Activation, or the Scale of a Gaussian's arguments
  bool has_scale = false, has_constant = false, has_floor = false, has_clamp = false;
  T x_scale, constant, floor, low, high;

  Extras() = default;
  explicit FASTVAE_INLINE Extras(const PassArgs& args)
      : transform(args.transform),
        has_scale(args.x_scale != 1),
        has_constant(args.constant != 0),
        has_floor(args.floor > 0),
        has_clamp(args.has_clamp),
        x_scale(static_cast<S>(args.x_scale)),
        constant(static_cast<S>(args.constant)),
        floor(static_cast<S>(args.floor)),
        low(static_cast<S>(args.low)),
        high(static_cast<S>(args.high)) {
    for (int i = 0; i < kMaxNumbers; ++i) number[i] = T(static_cast<S>(args.numbers[i]));
  }

  FASTVAE_INLINE Activation activation() const { return static_cast<Activation>(transform); }
  // `given` stands for a logvar. Only the first logvar, the posterior's, is clamped.
  FASTVAE_INLINE Spread<T> spread(T given, bool is_first) const {
    return spread_of(given, static_cast<Scale>(transform), has_clamp && is_first, low, high);
  }
};

// F::at. `variance` is exp(logvar) if the pass has computed it, else nullptr. Some formulas can use it.
template <class F, class T, int n>
FASTVAE_INLINE Terms<T, n> at(const T (&in)[n], const T* number, const T* variance) {
  if constexpr (F::kUsesVariance) {
    if (variance != nullptr) return F::at(in, number, *variance);
  }
  return F::at(in, number);
}

// F's terms where the user gives log sigma or sigma instead of logvar, or where the posterior's logvar is clamped.
template <class F, class T, int n>
FASTVAE_INLINE Terms<T, n> at_spreads(T (&in)[n], const Extras<T>& extras, const T* variance) {
  [[maybe_unused]] T given[2], logvar[2];
  T slope[n];
  int logvars = 0;
  FASTVAE_UNROLL
  for (int i = 0; i < n; ++i) {
    if ((kLogvars<F> >> i & 1) == 0) continue;
    given[logvars] = in[i];
    const Spread<T> s = extras.spread(in[i], logvars++ == 0);
    in[i] = s.logvar;
    logvar[logvars - 1] = s.logvar;
    slope[i] = s.d_logvar;
  }
  Terms<T, n> terms;
  if constexpr (F::kUsesDifference) {
    if (extras.transform == static_cast<int>(Scale::sigma) && !extras.has_clamp) {
      using C = Constants<ScalarOf<T>>;
      const T ratio = quotient(given[0], given[1]), f = quotient(given[0] - given[1], given[1]);
      const T d = T(ScalarOf<T>(2)) * log_parts(ratio, f).log;
      terms = F::of_difference(
          in, select((ratio > T(C::kSmallestNormal)) & (ratio < T(C::kInfinity)), d, logvar[0] - logvar[1]));
    } else {
      terms = at<F>(in, extras.number, variance);
    }
  } else {
    terms = at<F>(in, extras.number, variance);
  }
  FASTVAE_UNROLL
  for (int i = 0; i < n; ++i) {
    if ((kLogvars<F> >> i & 1) == 0) continue;
    const T d = terms.d[i] * slope[i];
    terms.d[i] = extras.has_clamp ? select(slope[i] == T(0), T(0), d) : d;  // where clamped: 0, not infinity times 0
  }
  return terms;
}

// `weight` is nullptr where there is none.
template <class F, class T, int n>
FASTVAE_INLINE Terms<T, n> element(T (&in)[n], const Extras<T>& extras, const T* weight, const T* variance) {
  static_assert(n == kInputsOf<F>, "a formula gets its own inputs");
  T slope;
  if constexpr (F::kHasMean) {
    if (extras.activation() != Activation::none) {
      const Activated<T> mean = extras.activation() == Activation::sigmoid ? sigmoid(in[0]) : hyperbolic_tangent(in[0]);
      in[0] = mean.value;
      slope = mean.slope;
    }
  }
  if constexpr (kHasData<F>) {
    if (extras.has_scale) in[1] = in[1] * extras.x_scale;
  }
  Terms<T, n> terms;
  if constexpr (kHasData<F>) {
    terms = at<F>(in, extras.number, variance);
  } else {
    terms = extras.transform != 0 || extras.has_clamp ? at_spreads<F>(in, extras, variance)
                                                      : at<F>(in, extras.number, variance);
  }
  if constexpr (F::kHasMean) {
    if (extras.activation() != Activation::none) terms.d[0] = terms.d[0] * slope;
  }
  if constexpr (kHasData<F>) {
    if (extras.has_scale) terms.d[1] = terms.d[1] * extras.x_scale;
    if (extras.has_constant) terms.value = terms.value + extras.constant;
  } else {
    if (extras.has_floor) {
      const auto below = terms.value < extras.floor;  // false for NaN
      terms.value = select(below, extras.floor, terms.value);
      FASTVAE_UNROLL
      for (int i = 0; i < n; ++i) terms.d[i] = select(below, T(0), terms.d[i]);
    }
  }
  if (weight != nullptr) {  // a weight of 0 is not multiplied, since the element may be NaN
    const T zero(0);
    const auto absent = *weight == zero;
    terms.value = select(absent, zero, *weight * terms.value);
    FASTVAE_UNROLL
    for (int i = 0; i < n; ++i) terms.d[i] = select(absent, zero, *weight * terms.d[i]);
  }
  return terms;
}

FASTVAE_NAMESPACE_END
