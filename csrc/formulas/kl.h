// The KL divergence of the encoder's Gaussian N(mu, exp(logvar)) from the prior. Kingma and Welling, Auto-Encoding
// Variational Bayes (2014), appendix B.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// KL(N(mu, e^l) || N(0, 1)) = ((e^l - 1 - l) + mu^2) / 2: a sum of two terms that are never negative.
struct KlStandard : Formula {
  static constexpr const char *kName = "kl_standard", *kOp = "fastvae.kl_normal";
  static constexpr Argument kInputs[] = {{"mu", kMain}, {"logvar", kMain, true}};
  static constexpr bool kLight = true;
  static constexpr bool kUsesVariance = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T* number) {
    return at(in, number, exponential(in[1]));
  }
  // `variance` is exp(logvar), from a pass that already has it as sigma^2 of a sample. Near 1 its digits are not
  // enough, and a polynomial is used instead.
  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*, T variance) {
    const T mu = in[0], half = T(ScalarOf<T>(0.5));
    const ExpParts<T> e = exp_parts(in[1], variance);
    return {half * multiply_add(mu, mu, e.expm1_minus), {mu, half * e.expm1}};
  }
};

// KL(N(mu, e^l) || N(mu_p, e^p)) = ((e^d - 1 - d) + delta^2 e^-p) / 2 with d = l - p, delta = mu - mu_p.
struct KlBetween : Formula {
  static constexpr const char *kName = "kl_between", *kOp = "fastvae.kl_normal";
  static constexpr Argument kInputs[] = {
      {"mu", kMain}, {"logvar", kMain, true}, {"mu_p", kMain}, {"logvar_p", kMain, true}};
  static constexpr bool kLight = true;
  static constexpr bool kUsesDifference = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 4> at(const T (&in)[4], const T*) {
    const T logvar = in[1], logvar_p = in[3];
    // The rounding error of d is corrected to first order. The derivative of e^d - 1 - d is e^d - 1, which is large
    // where the error matters.
    const T d = logvar - logvar_p;
    const T back = d - logvar;
    const T lost = (logvar - (d - back)) - (logvar_p + back);  // Knuth's two-sum: d + lost = logvar - logvar_p exactly
    ExpParts<T> e = exp_parts(d);
    // Where `lost` or e is not finite, a correction would make NaN.
    const auto finite = (lost == lost) & (e.expm1 - e.expm1 == T(0));
    e.expm1_minus = e.expm1_minus + select(finite, e.expm1 * lost, T(0));
    e.expm1 = e.expm1 + select(finite, (e.expm1 + T(1)) * lost, T(0));
    return of_parts(in, e);
  }
  // For a caller that has a better d = logvar - logvar_p.
  template <class T>
  static FASTVAE_INLINE Terms<T, 4> of_difference(const T (&in)[4], T d) {
    return of_parts(in, exp_parts(d));
  }

 private:
  template <class T>
  static FASTVAE_INLINE Terms<T, 4> of_parts(const T (&in)[4], const ExpParts<T>& e) {
    const T delta = in[0] - in[2], half = T(ScalarOf<T>(0.5));
    const T pull = delta * exponential(-in[3]);
    return {half * (e.expm1_minus + delta * pull), {pull, half * e.expm1, -pull, -(half * (e.expm1 + delta * pull))}};
  }
};

FASTVAE_NAMESPACE_END
