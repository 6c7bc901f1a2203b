// Shared by the likelihoods of counts. Most counts are 0, and a likelihood at 0 is cheap. So a formula has one part for
// x = 0 and one for x > 0, and the CPU's pass computes the second part only where it is needed.
#pragma once

#include "../math/gamma.h"
#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// F has at_zero(in) for x = 0, and at_positive(in) for every other x: for x > 0 and for an invalid x, such as NaN.
template <class F>
struct OfCounts : Formula {
  static constexpr bool kCounts = true, kSparse = true;

  template <class T, int n>
  static FASTVAE_INLINE Terms<T, n> at(const T (&in)[n], const T*) {
    const auto positive = in[1] != T(0);
    Terms<T, n> terms = F::at_zero(in);
    if (!any_of(positive, in[1])) return terms;
    T inside[n];
    for (int i = 0; i < n; ++i) inside[i] = select(positive, in[i], T(1));  // where x = 0: inputs that make no NaN
    const Terms<T, n> other = F::at_positive(inside);
    terms.value = select(positive, other.value, terms.value);
    for (int i = 0; i < n; ++i) terms.d[i] = select(positive, other.d[i], terms.d[i]);
    return terms;
  }
};

// One part of F: at_zero alone, or at_positive alone. The first is so light that a loop without extras is worth it.
template <class F, bool kZero>
struct Restricted : F {
  static constexpr bool kLight = kZero;

  template <class T, int n>
  static FASTVAE_INLINE Terms<T, n> at(const T (&in)[n], const T*) {
    if constexpr (kZero) {
      return F::at_zero(in);
    } else {
      return F::at_positive(in);
    }
  }
};

// NaN for an input that is impossible. Everything that is computed from it is NaN then.
template <class Condition, class T>
FASTVAE_INLINE T nan_if(const Condition& impossible, T x) {
  return select(impossible, T(Constants<ScalarOf<T>>::kNan), x);
}
template <class T>
FASTVAE_INLINE auto is_no_count(T x) {  // a NaN needs no test: it stays NaN
  return (x < T(0)) | (x == T(Constants<ScalarOf<T>>::kInfinity));
}

FASTVAE_NAMESPACE_END
