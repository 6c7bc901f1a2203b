// -log Poisson(x; e^recon_x) = e^l - x l + log x!, l = recon_x.
#pragma once

#include "counts.h"

FASTVAE_NAMESPACE_BEGIN

// Without log x!, as in torch.nn.functional.poisson_nll_loss.
struct Poisson : Formula {
  static constexpr const char* kName = "poisson";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr bool kCounts = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    const T l = in[0], x = in[1], rate = exponential(l);
    return {rate - x * l, {rate - x, -l}};
  }
};

// With log x!, in Loader's form (math/gamma.h): log(2 pi x) / 2 + delta(x) + x phi(e^l / x - 1). x < 0 gives NaN.
struct PoissonFull : OfCounts<PoissonFull> {
  static constexpr const char* kName = "poisson_full";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at_zero(const T (&in)[2]) {
    const T rate = exponential(in[0]);
    return {rate, {rate, T(0)}};
  }
  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at_positive(const T (&in)[2]) {
    using S = ScalarOf<T>;
    const T x = in[1], given = nan_if(is_no_count(x) | (x != x), in[0]);
    const T l = at_least(given, T(S(-80))), rate = exponential(l), more = rate - x;  // linear below -80
    const T rest = log_parts(quotient(rate, x), quotient(more, x)).rest + (l - given);
    const T spread = T(S(0.5)) * logarithm(T(S(6.28318530717958648)) * x);
    const T value = spread + (stirling_of_any(x).delta + x * rest);
    return {select(rate == T(Constants<S>::kInfinity), rate, value), {more, T(0)}};
  }
};

FASTVAE_NAMESPACE_END
