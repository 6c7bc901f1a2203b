// The terms of log-likelihoods of counts: log(1 + f), f - log(1 + f), and the error of Stirling's formula. Loader (Fast
// and accurate computation of binomial probabilities, 2000) writes the binomial and similar distributions as sums of
// terms that are never negative, so nothing cancels. Differences of lgamma lose all their digits.
// minimax.py computes the coefficients.
#pragma once

#include "elementary.h"

FASTVAE_NAMESPACE_BEGIN

// log(1 + f) and f - log(1 + f), from f and `whole` = 1 + f, which are rounded separately: near 0 only f has enough
// digits, elsewhere only 1 + f.
template <class T>
struct LogParts {
  T log;
  T rest;
};
template <bool kProbability, class T>
FASTVAE_INLINE LogParts<T> log_parts_of(T whole, T f) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  constexpr int kUp = C::kMantissa + 1;  // lifts subnormal numbers
  const T up(S(uint64_t(1) << kUp));
  T n, m;
  if constexpr (kProbability) {
    const auto s = split<kUp>(whole * up);
    n = s.n, m = s.m;
  } else {
    const auto subnormal = whole < T(C::kSmallestNormal);
    const auto s = split(select(subnormal, whole * up, whole));
    n = select(subnormal, s.n - T(S(kUp)), s.n), m = s.m;
  }
  const auto near = n == T(0);
  const T g = select(near, f, m - T(1)), square = g * g, p = C::log_polynomial(g);
  T log = multiply_add(n, T(C::kLn2), multiply_add(square, p, g));
  if constexpr (kProbability) {
    log = select(whole > T(0), log, whole - T(C::kInfinity));  // -infinity at 0; a NaN stays
  } else {
    log = logarithm_at_ends(whole, log);
  }
  return {log, select(near, -(square * p), (whole - T(1)) - log)};
}
template <class T>
FASTVAE_INLINE LogParts<T> log_parts(T whole, T f) {
  return log_parts_of<false>(whole, f);
}
// The same for a probability 1 + f, with less work.
template <class T>
FASTVAE_INLINE LogParts<T> log_parts_of_probability(T whole, T f) {
  return log_parts_of<true>(whole, f);
}

// The error of Stirling's formula: delta(z) = log z! - (z + 1/2) log z + z - log(2 pi) / 2, and
// chi(z) = -delta'(z) = log z - 1 / (2 z) - digamma(z).
template <class T>
struct Stirling {
  T delta;
  T chi;
};

// For z >= 1. In double the polynomial holds for z >= 8. For a smaller z it is taken at z + 8, and the differences
// delta(z + k) - delta(z + k + 1) are added. They do not cancel: with s = 1 / (2 z + 1),
// (z + 1/2) log(1 + 1 / z) - 1 = s^2 / 3 + s^4 / 5 + ...
template <class T>
FASTVAE_INLINE Stirling<T> stirling(T z) {
  using S = ScalarOf<T>;
  const T one = T(1), half = T(S(0.5));
  if constexpr (sizeof(S) == sizeof(float)) {
    const T t = quotient(one, z);
    return {t * polynomial(t, 0.08333333082f, -7.496256181e-8f, -0.002773417204f, -5.032660981e-5f, 0.001044424985f,
                           -0.0006294983959f, 0.0001370309621f),
            t * t *
                polynomial(t, 0.08333333771f, -7.494782185e-7f, -0.008312237602f, -0.0002266986561f, 0.005160147478f,
                           -0.003282271497f, -7.076455188e-5f, 0.0009163726144f, -0.0003014751643f)};
  } else {
    constexpr int n = 8;
    const auto below = z < T(S(n));
    const bool any_below = any_of(below, z);
    const T above = any_below ? select(below, z + T(S(n)), z) : z;
    const T t = quotient(one, above), y = t * t;
    Stirling<T> result{t * polynomial(y, 0.08333333333333333332, -0.002777777777777678607, 0.0007936507935156561647,
                                      -0.0005952380249331315944, 0.0008417328011944964239, -0.001914991620787989728,
                                      0.006209331549750587236, -0.02087764005439743717),
                       y * polynomial(y, 0.08333333333333333314, -0.008333333333331732297, 0.003968253966069171295,
                                      -0.004166665528108554591, 0.007575464770615706768, -0.02105151525213363476,
                                      0.08004448641437801479, -0.2998108622774296126)};
    for (int k = n - 1; any_below && k >= 0; --k) {
      const T s = quotient(half, (z + T(S(k))) + half), square = select(below, s * s, T(0));
      const T delta =
          polynomial(square, 0.3333333333333333333, 0.2000000000000000787, 0.1428571428571092371, 0.1111111111167275129,
                     0.0909090904251454849, 0.07692310147472331264, 0.06666587934564295841, 0.05884007984251445406,
                     0.05240101123788028197, 0.04971674177687131248, 0.03164543560781720759, 0.07619747960825210516);
      const T chi = polynomial(square, 1.333333333333333333, 1.599999999999999855, 1.714285714285787439,
                               1.777777777763319827, 1.818181819663602388, 1.846153755978701797, 1.866670179125797984,
                               1.882261606320198285, 1.896353879574983987, 1.885263347707053882, 2.069669715795093746,
                               1.12928794571963552, 4.1015590951551003);
      result.delta = multiply_add(square, delta, result.delta);
      result.chi = multiply_add(s * square, chi, result.chi);
    }
    return result;
  }
}

// The same for z > 0. Below 1, delta(z) = delta(z + 1) + (z + 1/2) log(1 + 1 / z) - 1.
template <class T>
FASTVAE_INLINE Stirling<T> stirling_of_any(T z) {
  const T one = T(1), half = T(ScalarOf<T>(0.5));
  const auto below = z < one;
  if (!any_of(below, z)) return stirling(z);
  const T above = select(below, z + one, z), t = quotient(one, z);
  const Stirling<T> s = stirling(above);
  const T log = log1p(t);
  return {select(below, s.delta + ((z + half) * log - one), s.delta),
          select(below, s.chi + (half * (t + quotient(one, above)) - log), s.chi)};
}

FASTVAE_NAMESPACE_END
