// What likelihoods of counts share. Most counts are 0, and there a likelihood is cheap: a formula says what it is at 0
// and above 0, and the CPU's pass computes the second only where it is wanted.
#pragma once

#include "../math/gamma.h"
#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// F has at_zero(in) and at_positive(in), the latter for x > 0 or for an x that is no count, such as NaN.
template <class F>
struct OfCounts : Formula {
  static constexpr bool kCounts = true, kSparse = true;

  template <class T, int n>
  static FASTVAE_INLINE Terms<T, n> at(const T (&in)[n], const T*) {
    const auto positive = in[1] != T(0);
    Terms<T, n> terms = F::at_zero(in);
    if (!any_of(positive, in[1])) return terms;
    T inside[n];
    for (int i = 0; i < n; ++i) inside[i] = select(positive, in[i], T(1));  // no NaN, nor its derivative, elsewhere
    const Terms<T, n> other = F::at_positive(inside);
    terms.value = select(positive, other.value, terms.value);
    for (int i = 0; i < n; ++i) terms.d[i] = select(positive, other.d[i], terms.d[i]);
    return terms;
  }
};

// F at one of the two.
template <class F, bool kZero>
struct Restricted : F {
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
