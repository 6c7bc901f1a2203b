// The squared error, as in torch.nn.functional.mse_loss, and the Gaussian of unit variance:
// -log N(x; recon_x, 1) = (recon_x - x)^2 / 2 + log(2 pi) / 2.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

struct SquaredError : Formula {
  static constexpr const char* kName = "mse";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr bool kLight = true;
  static constexpr bool kHasMean = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    const T delta = in[0] - in[1], twice = delta + delta;
    return {delta * delta, {twice, -twice}};
  }
};

struct UnitGaussian : Formula {
  static constexpr const char* kName = "gaussian";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr bool kLight = true;
  static constexpr bool kHasMean = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    const T delta = in[0] - in[1];
    return {T(ScalarOf<T>(0.5)) * (delta * delta), {delta, -delta}};
  }
};

FASTVAE_NAMESPACE_END
