// -log N(x; recon_x, exp(logvar)) = (logvar + (recon_x - x)^2 e^-logvar) / 2 + log(2 pi) / 2.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

struct Gaussian : Formula {
  static constexpr const char* kName = "gaussian_logvar";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"logvar", kParameter}};
  static constexpr bool kHasMean = true;
  static constexpr bool kLight = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at(const T (&in)[3], const T*) {
    const T delta = in[0] - in[1], logvar = in[2], half = T(ScalarOf<T>(0.5));
    // Not delta^2 times the precision: delta^2 can overflow.
    const T pull = delta * finite_at_zero(delta, exponential(-logvar));
    const T square = delta * pull;
    return {half * (logvar + square), {pull, -pull, half * (T(1) - square)}};
  }
};

FASTVAE_NAMESPACE_END
