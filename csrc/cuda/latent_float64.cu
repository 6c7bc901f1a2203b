#include "latent.cuh"

namespace fastvae::cuda {
template cudaError_t latent_as<double>(const LatentArgs&, int64_t, const Sums&, const Launch&);
template cudaError_t latent_elements<double>(const LatentArgs&, int64_t, const Sums&, const Launch&);
}  // namespace fastvae::cuda
