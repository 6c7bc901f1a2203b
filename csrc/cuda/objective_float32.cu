#include "objective.cuh"

namespace fastvae::cuda {
FASTVAE_OBJECTIVE(, float, float)
FASTVAE_OBJECTIVE(, float, BFloat16)
FASTVAE_OBJECTIVE(, float, Float16)
FASTVAE_OBJECTIVE_ELEMENTS(, float)
}  // namespace fastvae::cuda
