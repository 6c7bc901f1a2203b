// Checks of the ops' arguments. They run once, where a call enters the library. `op` is the function that the user
// called. Each check raises a ValueError, TypeError or RuntimeError that names `op`.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fastvae {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor or_undefined(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Advice for a build without CUDA.
inline constexpr const char* kHowToGetCuda =
    "move the tensors to the CPU, or rebuild fastvae beside a CUDA build of torch and its nvcc (`fastvae info` says "
    "why "
    "CUDA was left out)";
// The dtype's name in Python.
std::string dtype_name(const Tensor& t);
bool is_supported(at::ScalarType);
bool is_supported_integer(at::ScalarType);
void check_dtype(const char* op, const char* name, const Tensor& t);
// A strided floating-point tensor (or an integer one, if that is allowed), on a device that this build serves.
void check_tensor(const char* op, const char* name, const Tensor& t, bool may_be_integer = false);
// t is not 0-dim. For the first tensor, whose shape the others have.
void check_batch(const char* op, const char* name, const Tensor& t);
void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_broadcasts(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
// The 16-bit dtypes and float32 may be mixed; float64 goes only with float64.
void check_same_arithmetic(const char* op, const char* name, const Tensor& t, const char* other_name,
                           const Tensor& other);
void check_posterior(const char* op, const Tensor& mu, const Tensor& logvar);
void check_prior(const char* op, const Tensor& mu, const OptionalTensor& mu_p, const OptionalTensor& logvar_p);
void check_weight(const char* op, const Tensor& weight, const char* other_name, const Tensor& other);
void check_noise(const char* op, const Tensor& mu, const OptionalTensor& eps,
                 const std::optional<at::Generator>& generator);

}  // namespace fastvae
