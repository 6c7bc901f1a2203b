#include "latent.cuh"

namespace fastvae::cuda {
template cudaError_t latent_as<Float16>(const LatentArgs&, int64_t, const Sums&, const Launch&);
template cudaError_t latent_elements<float>(const LatentArgs&, int64_t, const Sums&, const Launch&);
}  // namespace fastvae::cuda
