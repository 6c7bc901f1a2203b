// Binary cross-entropy, -x log p - (1 - x) log(1 - p), from logits and from probabilities.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// p = 1 / (1 + e^-l), as in torch.nn.functional.binary_cross_entropy_with_logits. With t = e^-|l| the value is a sum of
// two terms that are never negative, so nothing cancels. The derivative p - x keeps its digits where p is near x.
struct Bernoulli : Formula {
  static constexpr const char* kName = "bernoulli";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    const T l = in[0], x = in[1];
    const T t = exponential_of_negative(-absolute(l));
    const T rest = quotient(t, T(1) + t);  // p where l < 0, else 1 - p
    const auto negative = l < T(0);
    const T line = select(negative, -x * l, (T(1) - x) * l);
    return {line + log1p_of_fraction(t), {select(negative, rest - x, (T(1) - x) - rest), -l}};
  }
};

// As in torch.nn.functional.binary_cross_entropy: logarithms below -100 count as -100, but the derivative ignores that
// and is (p - x) / max(p (1 - p), 1e-12). A p outside [0, 1] gives NaN.
struct BernoulliProbabilities : Formula {
  static constexpr const char* kName = "bernoulli_probabilities";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    using S = ScalarOf<T>;
    const T p = in[0], x = in[1];
    const T log_p = logarithm_of_probability(p), log_rest = logarithm_of_complement(p), least = T(S(-100));
    const T variance = at_least(p * (T(1) - p), T(S(1e-12)));
    return {-(x * at_least(log_p, least) + (T(1) - x) * at_least(log_rest, least)),
            {quotient(p - x, variance), log_rest - log_p}};
  }
};

FASTVAE_NAMESPACE_END
