#include "latent.cuh"

namespace fastvae::cuda {

cudaError_t latent(const LatentArgs& args, int64_t numel, const Sums& sums, const Launch& launch) {
  switch (args.logvar.dtype) {
    case DType::float32:
      return latent_as<float>(args, numel, sums, launch);
    case DType::float64:
      return latent_as<double>(args, numel, sums, launch);
    case DType::bfloat16:
      return latent_as<BFloat16>(args, numel, sums, launch);
    case DType::float16:
      return latent_as<Float16>(args, numel, sums, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastvae::cuda
