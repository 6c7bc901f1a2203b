// The CUDA kernels as the ops call them: each is enqueued on a stream and returns at once.
#pragma once

#include <cuda_runtime_api.h>

#include "../multivariate/multivariate.h"
#include "../pairwise/pairwise.h"

namespace fastvae::cuda {

// Where a launch goes. The device is the current one; `partials` is memory for as many sums as partials() says.
struct Launch {
  cudaStream_t stream;
  int device;
  double* partials;
};

int64_t partials(const PassArgs&);
int64_t partials(const PassArgs& recon, const PassArgs& kl);
int64_t partials(const MixtureArgs&);
int64_t partials(const PairwiseArgs&, bool backward);
int64_t partials(const MultivariateArgs&, bool backward);

cudaError_t pass(const PassArgs&, const Launch&);
cudaError_t objective(const PassArgs& recon, const PassArgs& kl, const Combination&, const Launch&);
cudaError_t normal(const NormalArgs&, int64_t numel, const Launch&);
cudaError_t scale(const ScaleArgs&, const Launch&);
cudaError_t logistic_mixture(const MixtureArgs&, const Launch&);
cudaError_t pairwise(const PairwiseArgs&, bool backward, const Launch&);
cudaError_t multivariate(const MultivariateArgs&, bool backward, const Launch&);

}  // namespace fastvae::cuda
