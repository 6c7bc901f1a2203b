// The formula of one pair in one dimension, for numbers and vectors.
#pragma once

#include "../math/elementary.h"

FASTVAE_NAMESPACE_BEGIN

// l = constant - u^2 with u = (z - mu) scale.
template <class T>
struct Component {
  T scale, constant;
};
template <class T>
FASTVAE_INLINE Component<T> component(T logvar) {
  using S = ScalarOf<T>;
  const T half = T(S(-0.5)) * logvar;
  return {exponential(half) * T(S(0.70710678118654752440)),
          half - T(S(0.91893853320467274178))};  // sqrt(1/2), log(2 pi) / 2
}

template <class T>
FASTVAE_INLINE T scaled_distance(T z, T mu, T scale) {
  return (z - mu) * scale;
}
// constant - u^2. `constant` may include more than that of l, such as a log-weight.
template <class T>
FASTVAE_INLINE T log_density(T u, T constant) {
  return multiply_add(-u, u, constant);
}

// With G = dL/dl: dL/dz = -2 scale G u, dL/dmu = 2 scale G u and dL/dlogvar = G (u^2 - 1/2).
template <class T>
FASTVAE_INLINE T d_logvar(T u) {
  return multiply_add(u, u, T(ScalarOf<T>(-0.5)));
}

// A compensated sum: the rounding errors of its additions are added up in `lost`.
template <class T>
struct Compensated {
  T sum, lost;
  FASTVAE_INLINE void add(T x) {
    const T total = sum + x, back = total - sum;
    lost = lost + ((sum - (total - back)) + (x - back));  // Knuth's two-sum
    sum = total;
  }
  FASTVAE_INLINE void scale(T factor) {
    sum = sum * factor;
    lost = lost * factor;
  }
  FASTVAE_INLINE T total() const { return sum + lost; }
};

FASTVAE_NAMESPACE_END
