#include "latent.cuh"

namespace fastvae::cuda {
template cudaError_t latent_as<float>(const LatentArgs&, int64_t, const Sums&, const Launch&);
}  // namespace fastvae::cuda
