// The CUDA kernels as the ops call them: each is enqueued on a stream and returns at once.
#pragma once

#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace fastvae::cuda {

// Where a launch goes. The device is the current one; `partials` is memory for as many sums as partials() says.
struct Launch {
  cudaStream_t stream;
  int device;
  double* partials;
};

int64_t partials(int64_t numel, const Sums&);
int64_t partials(int64_t recon_numel, const Sums& recon, int64_t kl_numel, const Sums& kl);

// As in cpu/kernels.h.
cudaError_t reconstruction(const ReconstructionArgs&, int64_t numel, const Sums&, const Launch&);
cudaError_t latent(const LatentArgs&, int64_t numel, const Sums&, const Launch&);
cudaError_t objective(const ReconstructionArgs&, int64_t recon_numel, const Sums& recon, const LatentArgs&,
                      int64_t kl_numel, const Sums& kl, const Combination&, const Launch&);
cudaError_t normal(const NormalArgs&, int64_t numel, const Launch&);
cudaError_t scale(const ScaleArgs&, const Launch&);

}  // namespace fastvae::cuda
