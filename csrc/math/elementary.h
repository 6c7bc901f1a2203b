// exp, log, sin and cos. The same inputs must give the same bits on all instruction sets and devices, and the results
// of the libraries' functions differ in the last bits. These use only multiplication, addition and multiply_add, with
// errors of about one unit of rounding. minimax.py computes the coefficients.
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

// The coefficients are in functions, since device code cannot read an array of the host.
template <class S>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kInfinity = INFINITY, kNan = NAN, kSmallestNormal = 1.17549435e-38f;
  static constexpr float kLowest = -3.402823466e38f;
  static constexpr float kLog2E = 1.442695041f;
  static constexpr float kLn2 = 0.6931471806f;
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // hi has 9 bits: n * hi is exact
  static constexpr float kExpLowest = -105.0f, kExpHighest = 89.0f;        // beyond them exp is 0 and infinity
  static constexpr float kExpZero = -88.0f;                                // here exp is below the normal numbers
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: x + kRound - kRound is x rounded
  static constexpr int kMantissa = 23, kBias = 127;
  template <class T>
  static FASTVAE_INLINE T exp_tail(T x) {  // (e^x - 1 - x) / x^2, accurate enough for e^x
    return polynomial(x, 0.4999999345f, 0.1666652069f, 0.04166838739f, 0.008368709861f, 0.001381461184f);
  }
  template <class T>
  static FASTVAE_INLINE T expm1_minus_polynomial(T x) {
    return polynomial(x, 0.5000000021f, 0.1666666947f, 0.04166662829f, 0.008333143012f, 0.001389047266f,
                      0.0001987217038f, 2.454036441e-5f, 2.633630105e-6f, 4.196367805e-7f);
  }
  template <class T>
  static FASTVAE_INLINE T log_polynomial(T x) {
    return polynomial(x, -0.5f, 0.3333333171f, -0.2500082103f, 0.2000122687f, -0.1662335753f, 0.14201758f,
                      -0.1316018047f, 0.1276157735f, -0.0763450291f);
  }
  template <class T>
  static FASTVAE_INLINE T sin_polynomial(T x) {
    return polynomial(x, -0.1666665461f, 0.008332160762f, -0.0001951528315f);
  }
  template <class T>
  static FASTVAE_INLINE T cos_polynomial(T x) {
    return polynomial(x, 1.0f, -0.5f, 0.04166664568f, -0.001388731625f, 2.443315701e-5f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kInfinity = INFINITY, kNan = NAN, kSmallestNormal = 2.2250738585072014e-308;
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2 = 0.69314718055994530942;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpLowest = -746.0, kExpHighest = 710.0;
  static constexpr double kExpZero = -709.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  template <class T>
  static FASTVAE_INLINE T exp_tail(T x) {
    return polynomial(x, 0.5000000000000010617, 0.1666666666666641278, 0.0416666666665302659, 0.00833333333349433299,
                      0.00138888889435977115, 0.0001984126950677970039, 0.00002480149313617750499,
                      2.755758626635182813e-6, 2.763023392125934165e-7, 2.500007231554546171e-8);
  }
  template <class T>
  static FASTVAE_INLINE T expm1_minus_polynomial(T x) {
    return polynomial(x, 0.4999999999999999988, 0.1666666666666667101, 0.04166666666666675456, 0.008333333333332386559,
                      0.001388888888888103418, 0.0001984126984188253358, 0.00002480158730304115359,
                      2.755731904889840893e-6, 2.755731953236298885e-7, 2.505213263633755083e-8,
                      2.087663310130551458e-9, 1.605758852128391795e-10, 1.148381746826735204e-11,
                      7.657042270867080914e-13, 4.342518330575930672e-14, 4.418081487241623774e-15);
  }
  template <class T>
  static FASTVAE_INLINE T log_polynomial(T x) {
    return polynomial(x, -0.5, 0.3333333333333314376, -0.2499999999998797751, 0.2000000000006658736,
                      -0.1666666666982551645, 0.1428571428009587741, -0.1249999969147531212, 0.1111111114733171918,
                      -0.1000001520481934147, 0.09090923935161406593, -0.08332913576781160196, 0.07691529780663813867,
                      -0.07149438980051575237, 0.0668458922348201839, -0.06196682976095000276, 0.05668379637721580185,
                      -0.05677763278692590751, 0.06503472022965767757, -0.0598174270234584913, 0.0261514387625581);
  }
  template <class T>
  static FASTVAE_INLINE T sin_polynomial(T x) {
    return polynomial(x, -0.1666666666666663073, 0.00833333333332211861, -0.0001984126982958954837,
                      2.755731362138735752e-6, -2.505074776292234315e-8, 1.589623015366646328e-10);
  }
  template <class T>
  static FASTVAE_INLINE T cos_polynomial(T x) {
    return polynomial(x, 1.0, -0.5, 0.04166666666666659292, -0.001388888888887305639, 0.00002480158728885169491,
                      -2.755731417929413058e-7, 2.087570084163937483e-9, -1.135853650487429434e-11);
  }
};

// exp(x) for |x| <= ln2 / 2.
template <class T>
FASTVAE_INLINE T exp_polynomial(T x) {
  const T one(ScalarOf<T>(1));
  return multiply_add(multiply_add(Constants<ScalarOf<T>>::exp_tail(x), x, one), x, one);
}

// n + kShift has in its low bits what scale_by_power needs for the exponent fields of the factors of 2^n.
template <class S, bool kNegative>
constexpr int kShift = kNegative ? Constants<S>::kBias + 63 : 2 * Constants<S>::kBias;

// mantissa * 2^n, with t = n + kRound + kShift. 2^n is two factors, so that subnormal results and infinity are right
// and rounded once. If n is never positive, one factor is a constant. The left shift removes kRound from t's bits.
template <bool kNegative, class T>
FASTVAE_INLINE T scale_by_power(T mantissa, T, T t) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  using Int = typename Traits<T>::Int;
  if constexpr (kNegative)
    return mantissa * bit_cast<T>(bit_cast<Int>(t) << C::kMantissa) * T(S(1) / S(uint64_t(1) << 63));
  const Int both = bit_cast<Int>(t), half = both >> 1;
  return mantissa * bit_cast<T>(half << C::kMantissa) * bit_cast<T>((both - half) << C::kMantissa);
}

// exp(x): x = n ln2 + r with |r| <= ln2 / 2 (Cody and Waite).
template <bool kNegative, class T>
FASTVAE_INLINE T exponential_within(T x) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  const T round(C::kRound + S(kShift<S, kNegative>));
  const T t = multiply_add(x, T(C::kLog2E), round), n = t - round;
  const T r = multiply_add(n, T(-C::kLn2Lo), multiply_add(n, T(-C::kLn2Hi), x));
  return scale_by_power<kNegative>(exp_polynomial(r), n, t);
}
template <class T>
FASTVAE_INLINE T exponential(T x) {
  using C = Constants<ScalarOf<T>>;
  return exponential_within<false>(at_least(at_most(x, T(C::kExpHighest)), T(C::kExpLowest)));
}
// exp(x) for x <= 0.
template <class T>
FASTVAE_INLINE T exponential_of_negative(T x) {
  return exponential_within<true>(at_least(x, T(Constants<ScalarOf<T>>::kExpLowest)));
}
// exp(x) for |x| up to 87, or 700 in double: the result is a normal number.
template <class T>
FASTVAE_INLINE T exponential_of_normal(T x) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const T t = multiply_add(x, T(C::kLog2E), T(C::kRound)), n = t - T(C::kRound);
  const T r = multiply_add(n, T(-C::kLn2Lo), multiply_add(n, T(-C::kLn2Hi), x));
  return exp_polynomial(r) * bit_cast<T>((bit_cast<Int>(t) + Int(C::kBias)) << C::kMantissa);
}

// exp(x) for the logarithm x <= 0 of a weight, in the fewest operations. Results below the normal numbers are 0. One
// constant for log 2, instead of two, adds an error of at most |x| / 12 units of rounding.
template <class T>
FASTVAE_INLINE T exponential_of_log_weight(T x) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const T shift = T(C::kRound + C::kBias);
  x = at_least(x, T(C::kExpZero));
  const T t = multiply_add(x, T(C::kLog2E), shift);
  return exp_polynomial(multiply_add(t - shift, T(-C::kLn2), x)) * bit_cast<T>(bit_cast<Int>(t) << C::kMantissa);
}

// x, for a branch that select() takes only where the condition holds. For tensors (ops/elements.h) the result is 0
// elsewhere: autograd multiplies the derivative of the other branch by 0, and it must not be infinite.
template <class Condition, class T>
FASTVAE_INLINE T guarded(const Condition&, T x) {
  return x;
}

// exp(x) - 1 and exp(x) - 1 - x, both to a few units of rounding everywhere. In [-1, 2] the second is x^2 times a
// polynomial: expm1(x) - x loses all its digits near 0, and outside of [-1, 2] it loses less than the polynomial.
template <class T>
struct ExpParts {
  T expm1;
  T expm1_minus;
};

template <class T>
FASTVAE_INLINE ExpParts<T> exp_parts(T x, T exp_x) {
  using C = Constants<ScalarOf<T>>;
  const auto small = (x > T(-1)) & (x < T(2));
  const T inside = guarded(small, x);
  const T square = inside * inside, p = C::expm1_minus_polynomial(inside);
  const T expm1 = select(small, multiply_add(square, p, inside), exp_x - T(1));
  return {expm1, select(small, square * p, expm1 - x)};
}
template <class T>
FASTVAE_INLINE ExpParts<T> exp_parts(T x) {
  return exp_parts(x, exponential(x));
}

// e^x and e^x - 1 for x <= 0, each to a few units of rounding. Results below the normal numbers are 0.
template <class T>
struct ExpWithExpm1 {
  T exp;
  T expm1;
};

template <class T>
FASTVAE_INLINE ExpWithExpm1<T> exp_with_expm1(T x) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const T shift = T(C::kRound + C::kBias);
  x = at_least(x, T(C::kExpZero));
  const T t = multiply_add(x, T(C::kLog2E), shift), n = t - shift;
  const T r = multiply_add(n, T(-C::kLn2Lo), multiply_add(n, T(-C::kLn2Hi), x));
  const T power = bit_cast<T>(bit_cast<Int>(t) << C::kMantissa), rest = multiply_add(r * r, C::exp_tail(r), r);
  return {multiply_add(power, rest, power), multiply_add(power, rest, power - T(1))};
}

// x / 2^kScale, for a positive normal x, as 2^n m with m in [sqrt(1/2), sqrt(2)).
template <class T>
struct Split {
  T n;
  T m;
  typename Traits<T>::Int exponent;  // n
};
template <int kScale = 0, class T>
FASTVAE_INLINE Split<T> split(T x) {
  using C = Constants<ScalarOf<T>>;
  using Int = typename Traits<T>::Int;
  const Int sqrt_half = bit_cast<Int>(T(ScalarOf<T>(0.70710678118654752440)));
  const Int t = bit_cast<Int>(x) - (sqrt_half + (Int(kScale) << C::kMantissa));  // n in the top bits
  const Int n = t >> C::kMantissa;
  return {to_real(n), bit_cast<T>((t & Int((Int(1) << C::kMantissa) - Int(1))) + sqrt_half), n};
}

// n ln2 + log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]
template <class T>
FASTVAE_INLINE T logarithm_of_split(T n, T f) {
  using C = Constants<ScalarOf<T>>;
  return multiply_add(n, T(C::kLn2), multiply_add(f * f, C::log_polynomial(f), f));
}

// log x, which is `result` where x is positive and finite.
template <class T>
FASTVAE_INLINE T logarithm_at_ends(T x, T result) {
  using C = Constants<ScalarOf<T>>;
  return select(x > T(0), select(x < T(C::kInfinity), result, x), select(x == T(0), T(-C::kInfinity), T(C::kNan)));
}

template <class T>
FASTVAE_INLINE T logarithm(T x) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  const auto subnormal = x < T(C::kSmallestNormal);
  const auto s = split(select(subnormal, x * T(S(uint64_t(1) << C::kMantissa)), x));
  const T n = select(subnormal, s.n - T(S(C::kMantissa)), s.n);
  return logarithm_at_ends(x, logarithm_of_split(n, s.m - T(1)));
}

// log(1 + x). The rounding error of 1 + x is added to the mantissa.
template <class T>
FASTVAE_INLINE T log1p(T x) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  using Int = typename Traits<T>::Int;
  const T u = x + T(1);
  const T lost = x - (u - T(1));
  const auto s = split(u);
  const T scale = bit_cast<T>((Int(C::kBias + 2) - s.exponent) << C::kMantissa);  // 4 / 2^n, which never overflows
  const T f = select(s.n == T(0), x, multiply_add(lost * T(S(0.25)), scale, s.m - T(1)));
  return select(x == T(0), x, logarithm_at_ends(u, logarithm_of_split(s.n, f)));  // 0 keeps its sign
}

// log(1 + x) for x in [0, 1], without rounding 1 + x.
template <class T>
FASTVAE_INLINE T log1p_of_fraction(T x) {
  using S = ScalarOf<T>;
  const auto upper = x > T(S(0.41421356237309504880));
  return logarithm_of_split(select(upper, T(1), T(0)), select(upper, multiply_add(x, T(S(0.5)), T(S(-0.5))), x));
}

// The log of p = x / 2^kScale in (0, 1]. Above sqrt(1/2) p has too few digits, and `minus_one` = p - 1 is used.
template <int kScale, class T>
FASTVAE_INLINE T logarithm_of_fraction(T x, T minus_one) {
  const auto s = split<kScale>(x);
  return logarithm_of_split(s.n, select(s.n < T(0), s.m - T(1), minus_one));
}

// log p and log(1 - p) for p in [0, 1], with less work than logarithm(). NaN for the log of a negative number.
template <class T>
FASTVAE_INLINE T logarithm_of_probability(T p) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  constexpr int kUp = C::kMantissa + 1;  // lifts subnormal numbers
  const T result = logarithm_of_fraction<kUp>(p * T(S(uint64_t(1) << kUp)), p - T(1));
  return select(p > T(0), result, select(p == T(0), T(-C::kInfinity), T(C::kNan)));
}
template <class T>
FASTVAE_INLINE T logarithm_of_complement(T p) {
  using C = Constants<ScalarOf<T>>;
  const T result = logarithm_of_fraction<0>(T(1) - p, -p);
  return select(p < T(1), result, select(p == T(1), T(-C::kInfinity), T(C::kNan)));
}

// sin and cos for |x| <= pi / 4.
template <class T>
FASTVAE_INLINE void sine_cosine(T x, T& sine, T& cosine) {
  using C = Constants<ScalarOf<T>>;
  const T y = x * x;
  sine = multiply_add(x * y, C::sin_polynomial(y), x);
  cosine = C::cos_polynomial(y);
}

FASTVAE_NAMESPACE_END
