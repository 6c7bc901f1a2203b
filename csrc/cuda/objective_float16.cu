#include "objective.cuh"

namespace fastvae::cuda {
FASTVAE_OBJECTIVE(, Float16, float)
FASTVAE_OBJECTIVE(, Float16, BFloat16)
FASTVAE_OBJECTIVE(, Float16, Float16)
}  // namespace fastvae::cuda
