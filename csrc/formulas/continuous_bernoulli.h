// The density on [0, 1] that is proportional to e^(l x), l = recon_x. Its value is log((e^l - 1) / l) - l x.
// Loaiza-Ganem and Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders (2019).
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

struct ContinuousBernoulli : Formula {
  static constexpr const char* kName = "continuous_bernoulli";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    using S = ScalarOf<T>;
    const T l = in[0], x = in[1], half = T(S(0.5)), one = T(1);
    const auto near = absolute(l) < one;
    // log((e^l - 1) / l) = l / 2 + log(sinh(l / 2) / (l / 2)); its series has the terms B_2n / (2n (2n)!) l^2n.
    const T inside = guarded(near, l), y = inside * inside;
    T series, slope;
    if constexpr (sizeof(S) == sizeof(float)) {
      series = polynomial(y, 4.16666667e-2f, -3.47222222e-4f, 5.51146384e-6f, -1.03339947e-7f, 2.0876757e-9f);
      slope = polynomial(y, 8.33333333e-2f, -1.38888889e-3f, 3.30687831e-5f, -8.26719577e-7f, 2.0876757e-8f);
    } else {
      series = polynomial(y, 4.1666666666666667e-2, -3.4722222222222222e-4, 5.5114638447971781e-6,
                          -1.0333994708994709e-7, 2.0876756987868099e-9, -4.4034917822395777e-11,
                          9.5589546647747706e-13, -2.1185501852016143e-14, 4.7700344757099136e-16);
      slope = polynomial(y, 8.3333333333333333e-2, -1.3888888888888889e-3, 3.3068783068783069e-5,
                         -8.2671957671957672e-7, 2.0876756987868099e-8, -5.2841901386874932e-10, 1.3382536530684679e-11,
                         -3.3896802963225829e-13, 8.5860620562778446e-15);
    }
    // For |l| >= 1, m = 1 - e^-|l|: max(l, 0) + log(m / |l|). The mean is 1 / |l| - e^-|l| / m, or 1 minus it if l > 0.
    const T size = select(near, one, absolute(l));
    const T m = -exp_parts(-size, exponential_of_negative(-size)).expm1;
    const T per_size = quotient(one, size), rest = per_size - quotient(one - m, m);
    const auto negative = l < T(0);
    const T far = select(negative, T(0), l) + logarithm_of_probability(m * per_size);
    return {select(near, multiply_add(series, y, half * l), far) - l * x,
            {select(near, multiply_add(slope, inside, half) - x, select(negative, rest - x, (one - x) - rest)), -l}};
  }
};

FASTVAE_NAMESPACE_END
