// The reductions, as the integers that fastvae/functional.py makes of their names.
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels.h"

namespace fastvae {

using at::Tensor;

// `sample` + 8 k keeps k more dimensions than the first.
enum class Reduction : int64_t { sum, batchmean, mean, sample, none, latent, channel };
inline bool is_sample(Reduction r) { return static_cast<int64_t>(r) % 8 == static_cast<int64_t>(Reduction::sample); }
inline int64_t batch_dims(Reduction r) { return static_cast<int64_t>(r) / 8 + 1; }

inline bool is_scalar(Reduction r) { return r == Reduction::sum || r == Reduction::batchmean || r == Reduction::mean; }
// The divisor of the sums, without the sum of the weights.
c10::SymInt divisor(Reduction r, const Tensor& like);
double divisor_value(Reduction r, const Tensor& like);
// The divisor of a weighted mean: the sum of the weights over all elements. Undefined in all other cases.
Tensor weight_sum(Reduction r, const Tensor& weight, const Tensor& like);
// float64 for float64, else float32.
at::ScalarType result_type(const Tensor& like);
// An uninitialised result of the reduction.
Tensor empty_result(Reduction r, const Tensor& like);
// A result, or its gradient, with size 1 in the reduced dimensions, so that it broadcasts to like's shape.
Tensor unreduced(const Tensor& result, Reduction r, const Tensor& like);
Sums sums_of(const Tensor& result, Reduction r, const Tensor& like);

// ---- In aten ops, differentiable.

// g, the gradient of a reduced result, as a factor of the elements' gradients.
Tensor spread(const Tensor& g, Reduction r, const Tensor& like, const Tensor& weight);
// The elements' values, reduced. `value` may be undefined.
Tensor reduced(const Tensor& value, Reduction r, const Tensor& weight);
// t in the given dtype (float32 or float64), but float64 as it is.
Tensor widened(const Tensor& t, at::ScalarType = at::kFloat);

}  // namespace fastvae
