// The CPU kernels for pairs. dispatch.cpp shares out groups of rows and blocks of components.
#pragma once

#include "pairwise.h"

namespace fastvae::cpu {

constexpr int kPairComponents = 16;  // in a block
constexpr int kPairGroups = 8;       // of rows, most that the backward pass works on at a time

// Memory beside the arguments, of the arithmetic's type but for `terms`.
struct PairwiseScratch {
  void* components = nullptr;  // for each block, in each dimension: mu, scale and constant of its components
  void* joint = nullptr;       // [padded K] the constants summed over the dimensions
  void* bound = nullptr;       // [L] the largest constant, which is taken out of the marginals' exponents
  double* terms = nullptr;     // [3, B] of the decomposition
  // Of the backward pass, for this part of the rows and of the components.
  void *dz = nullptr, *dmu = nullptr, *dlogvar = nullptr, *dlog_weight = nullptr;
};

struct Pairwise {
  void (*pack)(const PairwiseArgs&, const PairwiseScratch&, int64_t block);
  void (*bound)(const PairwiseArgs&, const PairwiseScratch&);  // after all of pack
  void (*forward)(const PairwiseArgs&, const PairwiseScratch&, int64_t group);
  // The rows of groups [first, last) and the components of blocks [begin, end): writes dz, adds to the others.
  void (*backward)(const PairwiseArgs&, const PairwiseScratch&, int64_t first, int64_t last, int64_t begin,
                   int64_t end);
};

// kernels.cpp is compiled once for each of these.
extern const Pairwise pairwise_baseline, pairwise_avx2, pairwise_avx512;

// dispatch.cpp: all of it, on torch's threads and the best instruction set.
void pairwise_forward(const PairwiseArgs&);
void pairwise_backward(const PairwiseArgs&);

}  // namespace fastvae::cpu
