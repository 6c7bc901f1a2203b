// The reparameterized sample z = mu + sigma eps with sigma = exp(logvar / 2). Kingma and Welling, Auto-Encoding
// Variational Bayes (2014), equation 10.
#pragma once

#include "../math/gamma.h"
#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
FASTVAE_INLINE T standard_deviation(T logvar) {
  return exponential(logvar * T(ScalarOf<T>(0.5)));
}

// The logvar and sigma of an argument `given`, and their derivatives by it, which are 0 where logvar is clamped.
template <class T>
struct Spread {
  T logvar, d_logvar, sigma, d_sigma;
};
template <class T>
FASTVAE_INLINE Spread<T> spread_of(T given, Scale scale, bool has_clamp, T low, T high) {
  const T two(ScalarOf<T>(2)), half(ScalarOf<T>(0.5));
  Spread<T> s{given, T(1), T(0), T(0)};
  if (scale == Scale::log_sigma) {
    s.logvar = two * given;
    s.d_logvar = two;
  } else if (scale == Scale::sigma) {
    s.logvar = two * log_parts(given, given - T(1)).log;
    s.d_logvar = quotient(two, given);
  }
  const bool direct = scale == Scale::sigma;
  if (!direct) {
    s.sigma = standard_deviation(s.logvar);
    s.d_sigma = half * s.sigma * s.d_logvar;
  } else {
    s.sigma = given;
    s.d_sigma = T(1);
  }
  if (has_clamp) {  // a NaN stays
    const auto below = s.logvar < low;
    const auto above = s.logvar > high;
    const auto bounded = [&](T at_low, T at_high, T inside) {
      return select(below, at_low, select(above, at_high, inside));
    };
    s.logvar = bounded(low, high, s.logvar);
    s.d_logvar = bounded(T(0), T(0), s.d_logvar);
    s.sigma = bounded(standard_deviation(low), standard_deviation(high), s.sigma);
    s.d_sigma = bounded(T(0), T(0), s.d_sigma);
  }
  return s;
}

// dz/dmu = 1, dz/deps = sigma, dz/dlogvar = sigma eps / 2. (Not (z - mu) / 2, which cancels when sigma << |mu|.)
template <class T>
FASTVAE_INLINE T sample(T mu, T sigma, T eps) {
  return multiply_add(sigma, eps, mu);
}

FASTVAE_NAMESPACE_END
