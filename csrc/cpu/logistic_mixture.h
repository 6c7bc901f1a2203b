#pragma once

#include "../kernels.h"

FASTVAE_NAMESPACE_BEGIN

// The pixels [begin, end). `sum`, if it is not nullptr, takes the sum of their values.
void logistic_mixture(const MixtureArgs&, int64_t begin, int64_t end, double* sum);

FASTVAE_NAMESPACE_END
