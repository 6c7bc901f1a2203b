#include "objective.cuh"

namespace fastvae::cuda {
FASTVAE_OBJECTIVE(, BFloat16, float)
FASTVAE_OBJECTIVE(, BFloat16, BFloat16)
FASTVAE_OBJECTIVE(, BFloat16, Float16)
}  // namespace fastvae::cuda
