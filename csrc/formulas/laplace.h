// The absolute error, as in torch.nn.functional.l1_loss, and -log Laplace(x; recon_x, e^log_scale) =
// log_scale + |recon_x - x| e^-log_scale + log 2.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// 0 at 0, NaN for NaN. Its derivative is 0.
template <class T>
FASTVAE_INLINE T sign(T x) {
  return select(x > T(0), T(1), select(x < T(0), T(-1), T(0) * x));
}

struct L1 : Formula {
  static constexpr const char* kName = "l1";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr bool kHasMean = true;
  static constexpr bool kLight = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T*) {
    const T delta = in[0] - in[1], side = sign(delta);
    return {absolute(delta), {side, -side}};
  }
};

struct Laplace : Formula {
  static constexpr const char* kName = "laplace";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"log_scale", kParameter}};
  static constexpr bool kHasMean = true;
  static constexpr bool kLight = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at(const T (&in)[3], const T*) {
    const T delta = in[0] - in[1], log_scale = in[2];
    const T precision = exponential(-log_scale);
    const auto hit = delta == T(0);  // 0 times infinity is 0 here
    const T size = select(hit, T(0), absolute(delta) * precision);
    const T pull = select(hit, T(0), sign(delta) * precision);
    return {log_scale + size, {pull, -pull, T(1) - size}};
  }
};

FASTVAE_NAMESPACE_END
