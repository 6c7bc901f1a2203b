// The reparameterized sample z = mu + sigma eps with sigma = exp(logvar / 2). Kingma and Welling, Auto-Encoding
// Variational Bayes (2014), equation 10.
#pragma once

#include "../math/elementary.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
FASTVAE_INLINE T standard_deviation(T logvar) {
  return exponential(logvar * T(ScalarOf<T>(0.5)));
}

// dz/dmu = 1, dz/dlogvar = sigma eps / 2 (from eps, never from z - mu, which cancels when sigma << |mu|), dz/deps =
// sigma
template <class T>
FASTVAE_INLINE T sample(T mu, T sigma, T eps) {
  return multiply_add(sigma, eps, mu);
}
template <class T>
FASTVAE_INLINE T sample_d_logvar(T sigma, T eps) {
  return T(ScalarOf<T>(0.5)) * sigma * eps;
}

FASTVAE_NAMESPACE_END
