// The density of a Gaussian at a sample, and an estimate of the KL divergence from one sample.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// log N(z; mu, e^l) = -(l + t^2 + log(2 pi)) / 2 with t = (z - mu) e^(-l/2).
struct NormalLogProb : Formula {
  static constexpr const char *kName = "normal_log_prob", *kOp = "fastvae.normal_log_prob";
  static constexpr Argument kInputs[] = {{"z", kMain}, {"mu", kParameter}, {"logvar", kParameter, true}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at(const T (&in)[3], const T*) {
    using S = ScalarOf<T>;
    const T half = T(S(0.5)), delta = in[0] - in[1];
    // Not delta^2 times the precision: delta^2 can overflow.
    const T pull = delta * finite_at_zero(delta, exponential(-in[2])), square = delta * pull;
    return {-half * ((in[2] + T(S(1.8378770664093454836))) + square), {-pull, pull, half * (square - T(1))}};
  }
};

// log N(z; mu, e^l) - log N(z; mu_p, e^p) = ((t_p - t)(t_p + t) - d) / 2 with d = l - p, t = (z - mu) e^(-l/2) and
// t_p = (z - mu_p) e^(-p/2). Near the prior t_p and t cancel, so their difference is computed as
//   t_p - t = e^(-p/2) (mu - mu_p - (z - mu)(e^(-d/2) - 1)).
struct KlOneSample : Formula {
  static constexpr const char *kName = "kl_one_sample", *kOp = "fastvae.kl_one_sample";
  static constexpr Argument kInputs[] = {{"z", kMain},
                                         {"mu", kParameter},
                                         {"logvar", kParameter, true},
                                         {"mu_p", kParameter},
                                         {"logvar_p", kParameter, true}};
  static constexpr bool kUsesDifference = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 5> at(const T (&in)[5], const T*) {
    return of_difference(in, in[2] - in[4]);
  }
  template <class T>
  static FASTVAE_INLINE Terms<T, 5> of_difference(const T (&in)[5], T d) {
    using S = ScalarOf<T>;
    const T half = T(S(0.5)), delta = in[0] - in[1];
    const T apart = exp_parts(-half * d).expm1;
    const T delta_p = in[0] - in[3];
    const T precision = finite_at_zero(delta, exponential(-half * in[2]));
    const T precision_p = finite_at_zero(delta_p, exponential(-half * in[4]));
    const T t = delta * precision, t_p = delta_p * precision_p;
    const T pull = t * precision, pull_p = t_p * precision_p;
    const auto near = absolute(apart) < T(S(1e6));  // far apart nothing cancels
    const T difference = select(near, precision_p * ((in[1] - in[3]) - delta * apart), t_p - t);
    return {half * (difference * (t_p + t) - d),
            {select(near, precision_p * (difference - t * apart), pull_p - pull), pull, half * (t * t - T(1)), -pull_p,
             half * (T(1) - t_p * t_p)}};
  }
};

FASTVAE_NAMESPACE_END
