// exp, log and sin/cos of our own: a library's differ in the last bits between instruction sets, and the same inputs
// must give the same bits on all of them. All is plain multiplication and addition (multiply_add is an FMA on CUDA
// alone: the baseline has none), within about one unit of rounding. The coefficients are minimax.py's.
#pragma once

#include "scalar.h"

FASTVAE_NAMESPACE_BEGIN

// The polynomial with these coefficients, constant first, by Horner's rule.
template <class T>
FASTVAE_INLINE T polynomial(T, ScalarOf<T> last) {
  return T(last);
}
template <class T, class... Rest>
FASTVAE_INLINE T polynomial(T x, ScalarOf<T> first, Rest... rest) {
  return multiply_add(polynomial(x, rest...), x, T(first));
}

// In functions, since device code cannot refer to a host's array.
template <class S>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2E = 1.442695041f;
  static constexpr float kLn2 = 0.6931471806f;
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // hi has 9 bits: n * hi is exact
  static constexpr float kExpLowest = -105.0f, kExpHighest = 89.0f;        // beyond them exp is 0 and infinity
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: x + kRound - kRound is x rounded
  static constexpr int kMantissa = 23, kBias = 127;
  template <class T>
  static FASTVAE_INLINE T exp_polynomial(T x) {
    return polynomial(x, 0.4999999955f, 0.1666657732f, 0.04166685335f, 0.00836314038f, 0.001390128505f);
  }
  template <class T>
  static FASTVAE_INLINE T expm1_minus_polynomial(T x) {
    return polynomial(x, 0.5000000021f, 0.1666666947f, 0.04166662829f, 0.008333143012f, 0.001389047266f,
                      0.0001987217038f, 2.454036441e-5f, 2.633630105e-6f, 4.196367805e-7f);
  }
  template <class T>
  static FASTVAE_INLINE T log_polynomial(T x) {
    return polynomial(x, 0.666666851f, 0.3998876405f, 0.2958051167f);
  }
  template <class T>
  static FASTVAE_INLINE T sin_polynomial(T x) {
    return polynomial(x, -0.1666666464f, 0.008332744992f, -0.0001958736035f);
  }
  template <class T>
  static FASTVAE_INLINE T cos_polynomial(T x) {
    return polynomial(x, 0.04166666464f, -0.001388830097f, 2.454760803e-5f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2 = 0.69314718055994530942;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpLowest = -746.0, kExpHighest = 710.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  template <class T>
  static FASTVAE_INLINE T exp_polynomial(T x) {
    return polynomial(x, 0.5, 0.1666666666666667096, 0.04166666666666661845, 0.008333333333326167482,
                      0.001388888888891795484, 1.984126987472074862e-4, 2.48015872457489392e-5, 2.755725551428419883e-6,
                      2.755734961379914361e-7, 2.510517360883230208e-8, 2.088937562151309307e-9);
  }
  template <class T>
  static FASTVAE_INLINE T expm1_minus_polynomial(T x) {
    return polynomial(x, 0.5, 0.1666666666666666666, 0.04166666666666666625, 0.008333333333333334483,
                      0.001388888888888894377, 0.000198412698412687937, 0.00002480158730156168712,
                      2.755731922444396629e-6, 2.755731922908388414e-7, 2.50521082788872398e-8, 2.087675664491309129e-9,
                      1.60590569939215618e-10, 1.147072267359757261e-11, 7.646399645692621416e-13,
                      4.783747534006655899e-14, 2.821674369410398944e-15, 1.406828735103575543e-16,
                      1.29816664195909736e-17);
  }
  template <class T>
  static FASTVAE_INLINE T log_polynomial(T x) {
    return polynomial(x, 0.66666666666666697, 0.3999999999989917564, 0.2857142862610608799, 0.2222221111583547834,
                      0.1818289036891846622, 0.1533168401012087405, 0.1461687568354731418);
  }
  template <class T>
  static FASTVAE_INLINE T sin_polynomial(T x) {
    return polynomial(x, -0.1666666666666666459, 0.008333333333330924717, -1.984126983672780463e-4,
                      2.755731608860384969e-6, -2.505112926326197758e-8, 1.591796200915622764e-10);
  }
  template <class T>
  static FASTVAE_INLINE T cos_polynomial(T x) {
    return polynomial(x, 0.04166666666666666538, -0.001388888888888738763, 2.480158729875323952e-5,
                      -2.755731726608214278e-7, 2.087614522245102921e-9, -1.138256462059021616e-11);
  }
};

// mantissa * 2^n for an integer n, rounded once: in two factors, so that subnormal results and infinity come out right.
template <class T>
FASTVAE_INLINE T scale_by_power(T mantissa, T n) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const Int k = bit_cast<Int>(n + T(C::kRound)) - bit_cast<Int>(T(C::kRound));
  const Int half = k >> 1;
  const T scale1 = bit_cast<T>((half + Int(C::kBias)) << C::kMantissa);
  const T scale2 = bit_cast<T>((k - half + Int(C::kBias)) << C::kMantissa);
  return mantissa * scale1 * scale2;
}

// exp(x): x = n ln2 + r with |r| <= ln2 / 2 (Cody and Waite).
template <class T>
FASTVAE_INLINE T exponential(T x) {
  using C = Constants<ScalarOf<T>>;
  x = at_least(at_most(x, T(C::kExpHighest)), T(C::kExpLowest));
  const T n = multiply_add(x, T(C::kLog2E), T(C::kRound)) - T(C::kRound);
  const T r = multiply_add(n, T(-C::kLn2Lo), multiply_add(n, T(-C::kLn2Hi), x));
  return scale_by_power(T(1) + multiply_add(r * r, C::exp_polynomial(r), r), n);
}

// exp(x) - 1 and exp(x) - 1 - x, both to a few units of rounding everywhere. Near zero the second is x^2 times a
// polynomial: even expm1(x) - x has lost all its digits there. The range [-1, 2] is where the difference would cost
// more than the polynomial.
template <class T>
struct ExpParts {
  T expm1;
  T expm1_minus;
};

template <class T>
FASTVAE_INLINE ExpParts<T> exp_parts(T x, T exp_x) {
  using C = Constants<ScalarOf<T>>;
  const auto small = (x > T(-1)) & (x < T(2));
  const T near = x * x * C::expm1_minus_polynomial(x);
  const T expm1 = select(small, near + x, exp_x - T(1));
  return {expm1, select(small, near, expm1 - x)};
}
template <class T>
FASTVAE_INLINE ExpParts<T> exp_parts(T x) {
  return exp_parts(x, exponential(x));
}

// log of x / 2^kScale, a number in (0, 1], given 1 minus that number as well: near 1 only this has the digits. The
// number is 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), s = f / (2 + f), log(1 + f) = 2 s + s^3 p(s^2).
template <int kScale, class T>
FASTVAE_INLINE T logarithm(T x, T complement) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const Int sqrt_half = bit_cast<Int>(T(ScalarOf<T>(0.70710678118654752440)));
  const Int one = Int(1) << C::kMantissa;
  const Int t = bit_cast<Int>(x) - (sqrt_half + (Int(kScale) << C::kMantissa));  // e in the top bits
  const T n = to_real(t >> C::kMantissa);
  const T m = bit_cast<T>((t & (one - Int(1))) + sqrt_half);
  const T f = select(n < T(0), m - T(1), -complement);
  const T s = quotient(f, T(2) + f);
  const T y = s * s;
  return multiply_add(n, T(C::kLn2), s * multiply_add(y, C::log_polynomial(y), T(2)));
}

// sin and cos for |x| <= pi / 4.
template <class T>
FASTVAE_INLINE void sine_cosine(T x, T& sine, T& cosine) {
  using C = Constants<ScalarOf<T>>;
  const T y = x * x;
  sine = multiply_add(x, y * C::sin_polynomial(y), x);
  cosine = multiply_add(y, multiply_add(y, C::cos_polynomial(y), T(ScalarOf<T>(-0.5))), T(1));
}

FASTVAE_NAMESPACE_END
