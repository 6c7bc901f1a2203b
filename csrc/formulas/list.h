// The only list of the formulas. An op names a formula by its place in this list. Names, inputs, the kernels' instances
// and the composed form are made from the list.
#pragma once

#include "bernoulli.h"
#include "continuous_bernoulli.h"
#include "gaussian.h"
#include "kl.h"
#include "laplace.h"
#include "negative_binomial.h"
#include "normal.h"
#include "poisson.h"
#include "robust.h"
#include "squared_error.h"
#include "student_t.h"

// FASTVAE_FORMULAS(visit) is visit(KlStandard) visit(KlBetween) ...
#define FASTVAE_FORMULAS(visit)                                                                                       \
  visit(KlStandard) visit(KlBetween) visit(SquaredError) visit(UnitGaussian) visit(Gaussian) visit(L1) visit(Laplace) \
      visit(Huber) visit(Charbonnier) visit(StudentT) visit(Bernoulli) visit(BernoulliProbabilities)                  \
          visit(ContinuousBernoulli) visit(Poisson) visit(PoissonFull) visit(NegativeBinomial)                        \
              visit(NegativeBinomialLogits) visit(ZeroInflated) visit(NormalLogProb) visit(KlOneSample)
