// Losses that grow slower than the squared error. Huber, Robust estimation of a location parameter (1964); Charbonnier,
// Blanc-Feraud, Aubert, Barlaud, Two deterministic half-quadratic regularization algorithms for computed imaging
// (1994).
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// (recon_x - x)^2 / 2 for errors up to delta, linear beyond, as in torch.nn.functional.huber_loss.
struct Huber : Formula {
  static constexpr const char* kName = "huber";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr int kNumbers = 1;  // delta
  static constexpr bool kHasMean = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T* number) {
    const T error = in[0] - in[1];
    const T clamped = at_least(at_most(error, number[0]), -number[0]);
    return {clamped * (error - T(ScalarOf<T>(0.5)) * clamped), {clamped, -clamped}};
  }
};

// sqrt((recon_x - x)^2 + eps^2)
struct Charbonnier : Formula {
  static constexpr const char* kName = "charbonnier";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}};
  static constexpr int kNumbers = 1;  // eps
  static constexpr bool kHasMean = true;

  template <class T>
  static FASTVAE_INLINE Terms<T, 2> at(const T (&in)[2], const T* number) {
    // The larger of |error| and eps is factored out: no square overflows, and not both squares underflow.
    const T error = in[0] - in[1], size = absolute(error);
    const auto by_eps = size < number[0];
    const T larger = select(by_eps, number[0], size), smaller = select(by_eps, size, number[0]);
    const T ratio = quotient(smaller, larger);
    const T root = square_root(multiply_add(ratio, ratio, T(1)));
    const T pull = quotient(quotient(error, larger), root);
    return {larger * root, {pull, -pull}};
  }
};

FASTVAE_NAMESPACE_END
