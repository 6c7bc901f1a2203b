// Noise as tensors.
#pragma once

#include "pass.h"

namespace fastvae {

// The noise of a state, in the type of the arithmetic (float32, or float64 for float64). Callable while tracing.
Tensor noise_of(const Tensor& like, const Tensor& state);
// Noise by torch's own generator, where ours cannot be made.
Tensor torch_noise(const Tensor& like, const std::optional<at::Generator>& generator);
// New noise as a tensor of its own, where an op cannot draw for itself: vmap, which may lie outside of what
// differentiates, knows how to draw this.
Tensor noise_for_transform(const Tensor& like, const std::optional<at::Generator>& generator);

}  // namespace fastvae
