// -log StudentT(x; df, recon_x, e^log_scale) = (df + 1) / 2 log(1 + y^2) + log_scale + constant, with
// y = (recon_x - x) e^-log_scale / sqrt(df).
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

struct StudentT : Formula {
  static constexpr const char* kName = "student_t";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"log_scale", kParameter}};
  static constexpr int kNumbers = 1;  // df
  static constexpr bool kHasMean = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at(const T (&in)[3], const T* number) {
    using S = ScalarOf<T>;
    const T df = number[0], delta = in[0] - in[1], log_scale = in[2], one = T(1);
    const T slope = finite_at_zero(delta, exponential(-log_scale) * quotient(one, square_root(df)));  // dy/drecon_x
    const T y = delta * slope;
    // For a large |y|, log(1 + y^2) is 2 log |y| to the last digit, while y^2 could overflow. For a large |delta|, y
    // itself could overflow, so log |y| is computed as log |delta| - log_scale - log(df) / 2.
    const T bound(sizeof(S) == 4 ? S(1073741824.0) : S(1152921504606846976.0));
    const auto far = absolute(y) > bound, big = absolute(delta) > bound;
    const T inside = guarded(absolute(y) < bound + bound, y), square = inside * inside;
    const T part = log1p(select(far, select(big, absolute(delta), absolute(y)), square));
    const T moved = part + select(big, -(log_scale + T(S(0.5)) * logarithm(df)), T(0));
    const T q = quotient(one, select(far, delta, one + square));
    const T pull = (df + one) * select(far, q, y * q * slope);
    const T share = select(far, one, square * q);  // y^2 / (1 + y^2)
    return {multiply_add(T(S(0.5)) * (df + one), select(far, moved + moved, part), log_scale),
            {pull, -pull, one - (df + one) * share}};
  }
};

FASTVAE_NAMESPACE_END
