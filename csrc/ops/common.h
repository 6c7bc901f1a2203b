// What every op needs: its arguments checked once, reductions, and tensors as the kernels see them.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"

namespace fastvae {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

enum class Reduction { sum, batchmean, mean, sample, none };

// ---- Checks. `op` is the function the user called; each raises a ValueError, TypeError or RuntimeError that names it.

Reduction parse_reduction(const char* op, c10::string_view name, const char* argument, bool allow_none);
// What to do about a build without CUDA.
inline constexpr const char* kHowToGetCuda =
    "move the tensors to the CPU, or rebuild fastvae beside a CUDA build of torch and its nvcc (`fastvae info` says "
    "why "
    "CUDA was left out)";
// As Python spells it.
std::string dtype_name(const Tensor& t);
void check_dtype(const char* op, const char* name, const Tensor& t);
// A strided floating-point tensor, on a device that this build serves.
void check_tensor(const char* op, const char* name, const Tensor& t);
// Not 0-dim: for the first tensor, whose shape the others have.
void check_batch(const char* op, const char* name, const Tensor& t);
void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
// The 16-bit dtypes and float32 may meet; float64 meets only itself.
void check_same_arithmetic(const char* op, const char* name, const Tensor& t, const char* other_name,
                           const Tensor& other);
void check_posterior(const char* op, const Tensor& mu, const Tensor& logvar);
void check_prior(const char* op, const Tensor& mu, const OptionalTensor& mu_p, const OptionalTensor& logvar_p);
void check_noise(const char* op, const Tensor& mu, const OptionalTensor& eps,
                 const std::optional<at::Generator>& generator);

// ---- Reductions.

inline bool is_scalar(Reduction r) { return r == Reduction::sum || r == Reduction::batchmean || r == Reduction::mean; }
// What the sum over the elements (or over an event's) is divided by.
c10::SymInt divisor(Reduction r, const Tensor& like);
double divisor_value(Reduction r, const Tensor& like);
// float64 for float64, else float32.
at::ScalarType result_type(const Tensor& like);
// An uninitialised result of the reduction.
Tensor empty_result(Reduction r, const Tensor& like);
// g, the gradient of a reduced result, as a factor of the elements' gradients (differentiably).
Tensor spread(const Tensor& g, Reduction r, const Tensor& like);
// The elements reduced (differentiably); `value` may be undefined.
Tensor reduced(const Tensor& value, Reduction r);
// 16-bit tensors as float32, others as they are (differentiably).
Tensor widened(const Tensor& t);

// ---- Tensors as kernels see them.

// The order in which a pass visits the dimensions where that is free: as the first operand that is not expanded lies in
// memory (keep_batch: the batch dimension stays first). Empty means the logical order.
std::vector<int64_t> memory_order(at::ArrayRef<Tensor> operands, bool keep_batch);
View view_of(const Tensor& t, at::IntArrayRef order = {});
// The gradient of a reduced result, seen as a tensor of `like`'s shape.
View upstream_view(const Tensor& g, Reduction r, const Tensor& like, at::IntArrayRef order = {});
Number number_of(const OptionalTensor& t);
Sums sums_of(const Tensor& result, Reduction r, const Tensor& like);

// The gradients of the inputs that want one, uninitialised, with the inputs' layout.
Tensor empty_gradient(bool wanted, const Tensor& of);
std::vector<Tensor> defined_only(std::initializer_list<Tensor> tensors);

}  // namespace fastvae
