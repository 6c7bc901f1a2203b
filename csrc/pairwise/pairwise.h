// Terms over pairs (i, j): the log-density of each sample z_i under each Gaussian component j, and its sums over the
// components. With t = (z_id - mu_jd) e^(-logvar_jd / 2),
//
//   l_ijd = -(log 2 pi + logvar_jd + t^2) / 2                    log N(z_id; mu_jd, e^logvar_jd)
//   log_q_i = logsumexp_j (w_ij + sum_d l_ijd)                   the mixture
//   log_q_id = logsumexp_j (w_ij + l_ijd)                        its marginals, one for each dimension
//
// If log_q_i is the weighted aggregate posterior of a batch, these give the terms that beta-TCVAE weighs (Chen et al.,
// Isolating Sources of Disentanglement in VAEs, 2018): mutual information sum_d l_iid - log_q_i, total correlation
// log_q_i - sum_d log_q_id, dimension-wise KL sum_d log_q_id - log N(z_i; 0, 1).
//
// Nothing of size B K L is stored: the backward pass computes l_ijd again, with the same roundings. For each sum it
// needs only two numbers of the forward pass: the reference that was subtracted from the exponents, and the sum. It
// does not use the sum's logarithm: far from all components it is large, and its rounding error would scale every
// gradient.
#pragma once

#include "../kernels.h"

namespace fastvae {

constexpr int kPairRows = 32;  // the rows of a group

// All tensors are contiguous and have the arithmetic's type. A result that is nullptr is not wanted.
struct PairwiseArgs {
  int64_t rows = 0, components = 0, dims = 0;                 // B, K, L
  bool float64 = false;                                       // arithmetic in double
  bool joint = false, marginals = false;                      // which sums
  const void *z = nullptr, *mu = nullptr, *logvar = nullptr;  // [B, L], [K, L], [K, L]
  const void* log_weight = nullptr;                           // [B, K], or [K] for all rows
  bool weight_by_row = false;                                 // log_weight is [B, K]
  double other = 0, own = 0;                                  // w_ij and w_ii, without a log_weight
  // The forward pass writes stats for the backward pass: stats_of_a_row() numbers per row, for whole groups of rows.
  void* stats = nullptr;

  // The results of the forward pass: the sums; or the three terms, by row or summed and divided.
  void *log_q = nullptr, *log_q_dims = nullptr;  // [B], [B, L]
  bool decompose = false;
  void* terms[3] = {};
  bool by_row = false;
  double divisor = 1;

  // The backward pass: upstream gradients of log_q and log_q_dims, or of the three terms; and the gradients to make.
  const void* g[3] = {};
  void *dz = nullptr, *dmu = nullptr, *dlogvar = nullptr, *dlog_weight = nullptr;

  // The reference and the sum of the mixture, and those of each dimension.
  FASTVAE_INLINE int64_t stats_of_a_row() const { return 2 + (marginals ? 2 * dims : 0); }
};

}  // namespace fastvae
