// The likelihoods: for one element, the negative log-likelihood of x under the decoder's output and its derivatives. A
// new one is a struct here, a name in kernels.h and ops/likelihood.h, and a case beside the others in the kernels;
// CONTRIBUTING.md has the list.
#pragma once

#include "scalar.h"

FASTVAE_NAMESPACE_BEGIN

// (recon_x - x)^2: the squared error, without a half, as torch.nn.functional.mse_loss has it.
struct SquaredError {
  template <class T>
  static FASTVAE_INLINE T value(T recon_x, T x) {
    const T difference = recon_x - x;
    return difference * difference;
  }
  template <class T>
  static FASTVAE_INLINE T d_recon_x(T recon_x, T x) {
    const T difference = recon_x - x;
    return difference + difference;
  }
  template <class T>
  static FASTVAE_INLINE T d_x(T recon_x, T x) {
    return d_recon_x(x, recon_x);
  }
};

// (recon_x - x)^2 / 2: -log N(x; recon_x, 1) without its constant log(2 pi) / 2.
struct UnitGaussian {
  template <class T>
  static FASTVAE_INLINE T value(T recon_x, T x) {
    return T(ScalarOf<T>(0.5)) * SquaredError::value(recon_x, x);
  }
  template <class T>
  static FASTVAE_INLINE T d_recon_x(T recon_x, T x) {
    return recon_x - x;
  }
  template <class T>
  static FASTVAE_INLINE T d_x(T recon_x, T x) {
    return x - recon_x;
  }
};

FASTVAE_NAMESPACE_END
