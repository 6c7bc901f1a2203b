// The density proportional to e^(l x) on [0, 1], l = recon_x: log((e^l - 1) / l) - l x. Loaiza-Ganem and Cunningham,
// The continuous Bernoulli: fixing a pervasive error in variational autoencoders (2019).
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
    // log((e^l - 1) / l) = l / 2 + log(sinh(l / 2) / (l / 2)); the series has B_2n / (2n (2n)!) of l^2n.
    const T inside = guarded(near, l), y = inside * inside;
    const T series = polynomial(y, S(4.1666666666666667e-2), S(-3.4722222222222222e-4), S(5.5114638447971781e-6),
                                S(-1.0333994708994709e-7), S(2.0876756987868099e-9), S(-4.4034917822395777e-11),
                                S(9.5589546647747706e-13), S(-2.1185501852016143e-14), S(4.7700344757099136e-16));
    const T slope = polynomial(y, S(8.3333333333333333e-2), S(-1.3888888888888889e-3), S(3.3068783068783069e-5),
                               S(-8.2671957671957672e-7), S(2.0876756987868099e-8), S(-5.2841901386874932e-10),
                               S(1.3382536530684679e-11), S(-3.3896802963225829e-13), S(8.5860620562778446e-15));
    // Elsewhere, with m = 1 - e^-|l|: max(l, 0) + log(m / |l|), and the mean is 1 / |l| - e^-|l| / m, or 1 minus that.
    const T size = select(near, one, absolute(l));
    const T m = -exp_parts(-size).expm1;
    const T per_size = quotient(one, size), rest = per_size - quotient(one - m, m);
    const auto negative = l < T(0);
    const T far = select(negative, T(0), l) + logarithm(m * per_size);
    return {select(near, multiply_add(series, y, half * l), far) - l * x,
            {select(near, multiply_add(slope, inside, half) - x, select(negative, rest - x, (one - x) - rest)), -l}};
  }
};

FASTVAE_NAMESPACE_END
