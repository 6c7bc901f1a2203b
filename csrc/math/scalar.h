// The basic operations of the formulas, for one number. csrc/cpu/vec.h has the same names for a vector, so that every
// formula is written once, as a template over T.
#pragma once

#include <cmath>
#include <cstring>

#include "config.h"

FASTVAE_NAMESPACE_BEGIN

// For T = float or double (or a vector of them): the element's type, and integers of the same width.
template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Scalar = float;
  using Int = int32_t;
  using UInt = uint32_t;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Int = int64_t;
  using UInt = uint64_t;
};
template <class T>
using ScalarOf = typename Traits<T>::Scalar;

template <class To, class From>
FASTVAE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FASTVAE_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
FASTVAE_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }

// Whether a condition holds in any lane of a vector. If not, a branch need not be computed. The second argument is what
// the condition was made from: its type selects the overload.
FASTVAE_INLINE bool any_of(bool condition, float) { return condition; }
FASTVAE_INLINE bool any_of(bool condition, double) { return condition; }

FASTVAE_INLINE float absolute(float x) { return fabsf(x); }
FASTVAE_INLINE double absolute(double x) { return fabs(x); }

// a b + c, rounded once, on every device and instruction set. The compiler never fuses a product and a sum by itself
// (-ffp-contract=off), so a formula has the same roundings wherever it is compiled.
FASTVAE_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTVAE_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Rounded to the nearest, for x >= 2^-100. On a CUDA device the float version is the compiler's code for sqrt.rn
// without its branch for smaller numbers: it is as fast as the approximation and gives the CPU's bits.
FASTVAE_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  const float root = x * reciprocal;
  return multiply_add(multiply_add(-root, root, x), 0.5f * reciprocal, root);
#else
  return sqrtf(x);
#endif
}
FASTVAE_INLINE double square_root(double x) { return sqrt(x); }

// On a CUDA device the float version is an approximation, within two units of rounding if b is neither very small nor
// very large. The exact quotient takes ten times as long.
FASTVAE_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
FASTVAE_INLINE double quotient(double a, double b) { return a / b; }

// Signed integer to the floating type of its width. The double one is for |i| < 2^51 only: a vector of int64 has no
// conversion of its own before AVX-512.
FASTVAE_INLINE float to_real(int32_t i) { return static_cast<float>(i); }
FASTVAE_INLINE double to_real(int64_t i) { return static_cast<double>(i); }

// The smaller (larger) of x and a bound; NaN if x is NaN.
template <class T>
FASTVAE_INLINE T at_most(T x, T bound) {
  return select(x > bound, bound, x);
}
template <class T>
FASTVAE_INLINE T at_least(T x, T bound) {
  return select(x < bound, bound, x);
}

// An unsigned word to float, rounded once.
FASTVAE_INLINE float to_real_unsigned(uint32_t word) { return static_cast<float>(word); }

// The low 32 bits of a times m, in full.
FASTVAE_INLINE uint64_t multiply_low32(uint64_t a, uint32_t m) {
#if defined(__CUDA_ARCH__)  // from C++ the compiler makes an addition of zero upper words as well
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(m));
  return product;
#else
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m;
#endif
}

FASTVAE_NAMESPACE_END
