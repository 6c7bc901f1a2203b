#include "objective.cuh"

namespace fastvae::cuda {
FASTVAE_OBJECTIVE(, double, double)
FASTVAE_OBJECTIVE_ELEMENTS(, double)
}  // namespace fastvae::cuda
