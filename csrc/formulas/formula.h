// A formula is a likelihood or a divergence: a struct in this folder, named in list.h.
//
//   struct Laplace : Formula {
//     static constexpr const char* kName = "laplace";
//     static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"log_scale", kParameter}};
//     static constexpr bool kHasMean = true;
//     template <class T>
//     static FASTVAE_INLINE Terms<T, 3> at(const T (&in)[3], const T* number);
//   };
//
// `at` gives the value of one element and its derivatives. T is float, double, a vector of them, or a tensor
// (ops/elements.h), so the CPU's passes, CUDA's passes and the composed form in aten ops share one source. `number`
// holds constants that a user chooses, such as Huber's delta.
#pragma once

#include "../math/elementary.h"

FASTVAE_NAMESPACE_BEGIN

enum Role {
  kMain,       // an output of the encoder or the decoder; the other inputs have its shape, or broadcast to it
  kData,       // the target; it may have an integer dtype
  kParameter,  // broadcasts to the main input; where it does, its gradient is summed
};

struct Argument {
  const char* name;
  Role role;
  bool is_logvar = false;  // of a Gaussian: a user may give log sigma or sigma instead (Scale)
};

// The value of an element, and its derivatives by the inputs in their order.
template <class T, int n>
struct Terms {
  T value;
  T d[n];
};

// The defaults. A formula redefines what differs.
struct Formula {
  static constexpr const char* kOp = "fastvae.reconstruction_loss";  // the function that its users call
  static constexpr int kNumbers = 0;                                 // how many constants of its own it has
  static constexpr bool kHasMean = false;       // its first input is a mean: an activation may stand before it
  static constexpr bool kLight = false;         // so little arithmetic that a pass without extras is worth compiling
  static constexpr bool kCounts = false;        // its data are counts
  static constexpr bool kSparse = false;        // most data are 0 (counts.h); the data have no derivative
  static constexpr bool kUsesVariance = false;  // a second `at` also takes exp(logvar)
  // `of_difference` also takes logvar - logvar_p, which can be computed from two sigmas without cancellation.
  static constexpr bool kUsesDifference = false;
};

// The formula of a pass that only samples.
struct NoLoss : Formula {
  static constexpr bool kLight = true;
  static constexpr Argument kInputs[] = {{"mu", kMain}, {"logvar", kMain, true}};
};

template <class F>
constexpr int kInputsOf = sizeof(F::kInputs) / sizeof(Argument);
// Bit i: input i is a logvar. (A kernel on a GPU cannot read kInputs at run time.)
template <class F>
constexpr uint32_t logvars_of() {
  uint32_t mask = 0;
  for (int i = 0; i < kInputsOf<F>; ++i) mask |= static_cast<uint32_t>(F::kInputs[i].is_logvar) << i;
  return mask;
}
template <class F>
constexpr uint32_t kLogvars = logvars_of<F>();
template <class F>
constexpr bool kHasData = F::kInputs[1].role == kData;
template <class F>
constexpr bool kIsPosterior = F::kInputs[1].role == kMain;  // its inputs begin with mu and logvar

// e, but 0 where e is infinite and delta is 0. Then delta * e is 0, not NaN.
template <class T>
FASTVAE_INLINE T finite_at_zero(T delta, T e) {
  return select((delta == T(0)) & (e == T(Constants<ScalarOf<T>>::kInfinity)), T(0), e);
}

// The function from the decoder's output to the mean, if the pass computes it.
enum class Activation : int { none, sigmoid, tanh };
// What the user gives as the second argument of a Gaussian.
enum class Scale : int { logvar, log_sigma, sigma };

template <class T>
struct Activated {
  T value;
  T slope;
};

// 1 / (1 + e^-l), computed from t = e^-|l|, which cannot overflow.
template <class T>
FASTVAE_INLINE Activated<T> sigmoid(T l) {
  const T t = exponential_of_negative(-absolute(l));
  const T q = quotient(T(1), T(1) + t);
  return {select(l < T(0), t * q, q), t * q * q};
}

// With e = e^(-2|l|): tanh |l| = (1 - e) / (1 + e), near 0 with 1 - e from expm1, elsewhere as 1 - 2 e / (1 + e). The
// slope is 4 e / (1 + e)^2.
template <class T>
FASTVAE_INLINE Activated<T> hyperbolic_tangent(T l) {
  const T x = T(ScalarOf<T>(-2)) * absolute(l);
  const T e = exponential_of_negative(x), u = exp_parts(x, e).expm1;
  const T divisor = T(1) + e, q = quotient(T(1), divisor), rough = -u * q;
  // Corrects the rounding error of the product with 1 / (1 + e): the result is as exact as a division's.
  const T near = multiply_add(multiply_add(-rough, divisor, -u), q, rough), far = multiply_add(-(e + e), q, T(1));
  const T size = select(x > T(-1), near, far);
  return {select(l < T(0), -size, size), T(4) * e * q * q};
}

FASTVAE_NAMESPACE_END
