#include "latent.cuh"

namespace fastvae::cuda {
template cudaError_t latent_as<BFloat16>(const LatentArgs&, int64_t, const Sums&, const Launch&);
}  // namespace fastvae::cuda
