// Noise as tensors.
#pragma once

#include "pass.h"

namespace fastvae {

// The noise of a state, in the type of the arithmetic (float32, or float64 for float64). Callable while tracing.
Tensor noise_of(const Tensor& like, const Tensor& state);
// Torch's own noise, on devices without kernels.
Tensor torch_noise(const Tensor& like, const std::optional<at::Generator>& generator);
// New noise as a tensor, for use under a transform, where an op cannot draw by itself: vmap has a rule for this op.
Tensor noise_for_transform(const Tensor& like, const std::optional<at::Generator>& generator);

}  // namespace fastvae
