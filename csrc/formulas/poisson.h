// -log Poisson(x; e^recon_x) = e^l - x l + log x!, l = recon_x, without the last, as
// torch.nn.functional.poisson_nll_loss.
#pragma once

#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

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

FASTVAE_NAMESPACE_END
