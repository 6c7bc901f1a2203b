// The encoder's Gaussian N(mu, exp(logvar)): the reparameterized sample, the KL divergence from the prior, and their
// derivatives. Kingma and Welling, Auto-Encoding Variational Bayes (2014), equation 10 and appendix B.
#pragma once

#include "elementary.h"

FASTVAE_NAMESPACE_BEGIN

// sigma = exp(logvar / 2)
template <class T>
FASTVAE_INLINE T standard_deviation(T logvar) {
  return exponential(logvar * T(ScalarOf<T>(0.5)));
}

// z = mu + sigma eps;  dz/dmu = 1, dz/dlogvar = sigma eps / 2 (from eps, never from z - mu, which cancels when
// sigma << |mu|), dz/deps = sigma
template <class T>
FASTVAE_INLINE T sample(T mu, T sigma, T eps) {
  return multiply_add(sigma, eps, mu);
}
template <class T>
FASTVAE_INLINE T sample_d_logvar(T sigma, T eps) {
  return T(ScalarOf<T>(0.5)) * sigma * eps;
}

template <class T>
struct Kl {
  T value;
  T d_mu;
  T d_logvar;
  T d_mu_p;
  T d_logvar_p;
};

// KL(N(mu, e^l) || N(0, 1)) = ((e^l - 1 - l) + mu^2) / 2: a sum of two terms that are never negative. Given e^l, of
// which only the digits away from 1 are used: where there is a sample it is sigma^2.
template <class T>
FASTVAE_INLINE Kl<T> kl_standard(T mu, T logvar, T variance) {
  const T half = T(ScalarOf<T>(0.5));
  const ExpParts<T> e = exp_parts(logvar, variance);
  return {half * multiply_add(mu, mu, e.expm1_minus), mu, half * e.expm1, T(0), T(0)};
}

// KL(N(mu, e^l) || N(mu_p, e^p)) = ((e^d - 1 - d) + delta^2 e^-p) / 2 with d = l - p, delta = mu - mu_p.
// What rounding d loses comes back to first order: e^d - 1 - d has the derivative e^d - 1, which is large where it
// matters.
template <class T>
FASTVAE_INLINE Kl<T> kl_between(T mu, T logvar, T mu_p, T logvar_p) {
  const T half = T(ScalarOf<T>(0.5));
  const T d = logvar - logvar_p;
  const T back = d - logvar;
  const T lost = (logvar - (d - back)) - (logvar_p + back);  // Knuth's two-sum: d + lost = logvar - logvar_p exactly
  ExpParts<T> e = exp_parts(d);
  // Where either is infinite there is nothing to correct, only NaN to make.
  const auto finite = (lost == lost) & (e.expm1 - e.expm1 == T(0));
  e.expm1_minus = e.expm1_minus + select(finite, e.expm1 * lost, T(0));
  e.expm1 = e.expm1 + select(finite, (e.expm1 + T(1)) * lost, T(0));
  const T delta = mu - mu_p;
  const T precision = exponential(-logvar_p);
  const T pull = delta * precision;
  return {half * (e.expm1_minus + delta * pull), pull, half * e.expm1, -pull, -(half * (e.expm1 + delta * pull))};
}

FASTVAE_NAMESPACE_END
