// The CPU kernels for pairs. dispatch.cpp cuts rows into groups and components into blocks.
#pragma once

#include "pairwise.h"

namespace fastvae::cpu {

constexpr int kPairComponents = 16;  // in a block
constexpr int kPairGroups = 8;       // the most groups of rows that the backward pass works on at a time

// Memory besides the arguments. All of it but `terms` has the arithmetic's type.
struct PairwiseScratch {
  void* components = nullptr;  // for each block, in each dimension: mu, scale and constant of its components
  void* joint = nullptr;       // [padded K] the constants summed over the dimensions
  void* bound = nullptr;       // [L] the largest constant, which is subtracted from the marginals' exponents
  double* terms = nullptr;     // [3, B] of the decomposition
  // The gradients of the backward pass, for one part of the rows and of the components.
  void *dz = nullptr, *dmu = nullptr, *dlogvar = nullptr, *dlog_weight = nullptr;
};

struct Pairwise {
  void (*pack)(const PairwiseArgs&, const PairwiseScratch&, int64_t block);
  void (*bound)(const PairwiseArgs&, const PairwiseScratch&);  // after the last pack()
  void (*forward)(const PairwiseArgs&, const PairwiseScratch&, int64_t group);
  // The rows of groups [first, last) and the components of blocks [begin, end): writes dz, adds to the other gradients.
  void (*backward)(const PairwiseArgs&, const PairwiseScratch&, int64_t first, int64_t last, int64_t begin,
                   int64_t end);
};

// kernels.cpp is compiled once for each of these.
extern const Pairwise pairwise_baseline, pairwise_avx2, pairwise_avx512;

// dispatch.cpp: all pairs, on torch's threads and the best instruction set.
void pairwise_forward(const PairwiseArgs&);
void pairwise_backward(const PairwiseArgs&);

}  // namespace fastvae::cpu
