#include "objective.cuh"

namespace fastvae::cuda {
namespace {

template <class R>
cudaError_t with_x(const ReconstructionArgs& args, int64_t numel, const Sums& sums, const KlPass& kl,
                   const Launch& launch) {
  switch (args.x.dtype) {
    case DType::bfloat16:
      return objective_as<R, BFloat16>(args, numel, sums, kl, launch);
    case DType::float16:
      return objective_as<R, Float16>(args, numel, sums, kl, launch);
    default:
      return objective_as<R, float>(args, numel, sums, kl, launch);
  }
}

cudaError_t objective(const ReconstructionArgs& args, int64_t numel, const Sums& sums, const KlPass& kl,
                      const Launch& launch) {
  switch (args.recon_x.dtype) {
    case DType::float32:
      return with_x<float>(args, numel, sums, kl, launch);
    case DType::float64:
      return objective_as<double, double>(args, numel, sums, kl, launch);
    case DType::bfloat16:
      return with_x<BFloat16>(args, numel, sums, kl, launch);
    case DType::float16:
      return with_x<Float16>(args, numel, sums, kl, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t reconstruction(const ReconstructionArgs& args, int64_t numel, const Sums& sums, const Launch& launch) {
  return objective(args, numel, sums, {}, launch);
}

cudaError_t objective(const ReconstructionArgs& recon_args, int64_t recon_numel, const Sums& recon,
                      const LatentArgs& kl_args, int64_t kl_numel, const Sums& kl, const Combination& combination,
                      const Launch& launch) {
  if (combination.loss == nullptr) {  // gradients, perhaps of one part alone
    if (recon_numel == 0) return latent(kl_args, kl_numel, kl, launch);
    if (kl_numel == 0) return reconstruction(recon_args, recon_numel, recon, launch);
  }
  if (recon_args.float64 != kl_args.float64) {  // a kernel has one arithmetic
    if (const cudaError_t error = reconstruction(recon_args, recon_numel, recon, launch)) return error;
    if (const cudaError_t error = latent(kl_args, kl_numel, kl, launch)) return error;
    return combination.loss == nullptr ? cudaSuccess : finish({}, {recon}, {}, {kl}, combination, launch);
  }
  return objective(recon_args, recon_numel, recon, {&kl_args, kl_numel, kl, combination}, launch);
}

}  // namespace fastvae::cuda
