// Gaussians with full covariance: N(mu, T T') for each of B rows of mu, T a lower triangular matrix. One pass computes
// the samples z = mu + T eps and the KL divergences from N(0, I),
//
//   sum_i mu_i^2 / 2 + sum_(i > j) T_ij^2 / 2 + sum_i ((T_ii^2 - 1) / 2 - log T_ii).
//
// With the upstream gradients g of the KL and dz of the sample, the backward pass gives
//
//   dmu = dz + g mu,   dT_ij = dz_i eps_j + g (T_ij below the diagonal, T_ii - 1 / T_ii on it),   deps = T' dz.
#pragma once

#include "../kernels.h"
#include "../math/gamma.h"

namespace fastvae {

// All tensors are contiguous and have the arithmetic's type. A result that is nullptr is not wanted.
struct MultivariateArgs {
  int64_t rows = 0, dims = 0;  // B, L
  bool float64 = false;        // arithmetic in double
  bool packed = false;         // T has the rows of its lower triangle, one behind the other; else it is [L, L]
  const void *mu = nullptr, *scale_tril = nullptr, *eps = nullptr;  // [B, L], [B, L, L], [B, L]; eps may be absent
  void* z = nullptr;                                                // [B, L], if there is eps
  Sums kl;                                                          // each of rows / kl.count rows

  // The backward pass: upstream gradients, which may be absent, and the gradients to make.
  const void *dz = nullptr, *g = nullptr;
  void *dmu = nullptr, *dscale_tril = nullptr, *deps = nullptr;

  // The numbers of one matrix, and where its row i begins. What is behind column i is not read.
  FASTVAE_INLINE int64_t size() const { return packed ? dims * (dims + 1) / 2 : dims * dims; }
  FASTVAE_INLINE int64_t row(int64_t i) const { return packed ? i * (i + 1) / 2 : i * dims; }
  // The factor of the gradients of a row's KL. It is 0 where there is no upstream gradient.
  template <class T>
  FASTVAE_INLINE T upstream(int64_t b) const {
    if (g == nullptr) return T(0);
    const T given = static_cast<const T*>(g)[b * kl.count / rows];
    return static_cast<T>(static_cast<double>(given) / kl.divisor);
  }
};

namespace cpu {

// The rows [first, last). kernels.cpp is compiled once for each instruction set. `kl` has the KL of each row.
struct Multivariate {
  void (*forward)(const MultivariateArgs&, double* kl, int64_t first, int64_t last);
  void (*backward)(const MultivariateArgs&, int64_t first, int64_t last);
};
extern const Multivariate multivariate_baseline, multivariate_avx2, multivariate_avx512;

// dispatch.cpp: all rows, on torch's threads and the best instruction set.
void multivariate(const MultivariateArgs&, bool backward);

}  // namespace cpu
}  // namespace fastvae

FASTVAE_NAMESPACE_BEGIN

// What T_ii adds to the KL, and its derivative. With d = T_ii - 1 the value is d^2 / 2 + (d - log(1 + d)): two terms
// that are never negative, so that it keeps its digits near the prior.
template <class T>
struct DiagonalTerm {
  T value, d;
};
template <class T>
FASTVAE_INLINE DiagonalTerm<T> diagonal_term(T t) {
  using S = ScalarOf<T>;
  const T d = t - T(S(1));
  return {T(S(0.5)) * d * d + log_parts(t, d).rest, d * ((t + T(S(1))) / t)};
}

// dT_ij. `slope` is the KL's derivative by T_ij.
template <class T>
FASTVAE_INLINE T d_scale_tril(T dz, T eps, T g, T slope) {
  return multiply_add(dz, eps, g * slope);
}

FASTVAE_NAMESPACE_END
