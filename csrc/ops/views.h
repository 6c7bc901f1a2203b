// Tensors as the kernels see them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../kernels.h"

namespace fastvae {

using at::Tensor;

// The order in which a pass visits the dimensions, if it may choose: the memory order of the first operand that is not
// expanded. The first `kept` dimensions stay in place. Empty means the logical order.
std::vector<int64_t> memory_order(at::ArrayRef<Tensor> operands, int64_t kept);
View view_of(const Tensor& t, at::IntArrayRef order = {});
// The same for a tensor that broadcasts to like's shape.
View view_of(const Tensor& t, const Tensor& like, at::IntArrayRef order);
Number number_of(const Tensor& t);

}  // namespace fastvae
