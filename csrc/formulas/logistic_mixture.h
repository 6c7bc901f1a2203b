// The discretized mixture of logistics. Salimans, Karpathy, Chen and Kingma, PixelCNN++ (2017). A pixel of C channels
// and K components has K logits, then for each channel K means, K log-scales and, if C is 3, K raw coefficients. The
// tanh of a coefficient multiplies an earlier channel's x in the mean of the second or third channel.
#pragma once

#include "../kernels.h"
#include "../math/philox.h"
#include "formula.h"

FASTVAE_NAMESPACE_BEGIN

// -1 in the first bin, 1 in the last, else 0.
template <class T>
FASTVAE_INLINE T edge_of(T x, T low, T high) {
  return select(x < low, T(ScalarOf<T>(-1)), select(x > high, T(ScalarOf<T>(1)), T(ScalarOf<T>(0))));
}

// A number with more digits than T has: high + low.
template <class T>
struct Pair {
  T high, low;
};

// a - b, exactly (Knuth)
template <class T>
FASTVAE_INLINE Pair<T> difference(T a, T b) {
  const T d = a - b, back = d - a;
  return {d, (a - (d - back)) - (b + back)};
}

template <class T>
struct Coefficient {
  Pair<T> tanh;
  T slope;
};

// With e = e^(-2|x|) = 2^n (1 + p): tanh |x| = (1 - e) / (1 + e), a quotient of pairs. The slope is 4 e / (1 + e)^2.
template <class T>
FASTVAE_INLINE Coefficient<T> coefficient(T x) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  using Int = typename Traits<T>::Int;
  const T one(S(1)), y = at_least(T(S(-2)) * absolute(x), T(S(-87)));
  const T shifted = multiply_add(y, T(C::kLog2E), T(C::kRound)), n = shifted - T(C::kRound);
  const T r = multiply_add(n, T(-C::kLn2Lo), multiply_add(n, T(-C::kLn2Hi), y));
  const T power = bit_cast<T>((bit_cast<Int>(shifted) + Int(C::kBias)) << C::kMantissa);
  const T rest = power * multiply_add(r * r, C::exp_tail(r), r);
  const T above = one - power, below = one + power;
  const T dividend = above - rest, divisor = below + rest;
  const T q = quotient(one, divisor), high = dividend * q;
  const T lost = ((above - dividend) - rest) - high * ((below - divisor) + rest);
  const T low = (multiply_add(-high, divisor, dividend) + lost) * q;
  const auto negative = x < T(S(0));
  return {{select(negative, -high, high), select(negative, -low, low)}, T(S(4)) * (power + rest) * q * q};
}

// x[c] - mean, where the mean of the second and third channel depends on the earlier channels. For scales of e^-7 the
// digits of a float are too few in between, so every product and difference but the last is exact.
template <int c, class T>
FASTVAE_INLINE T distance(const Pair<T> (&x)[3], T mean, const Pair<T>& first, const Pair<T>& second) {
  if constexpr (c == 0) return (x[0].high - mean) + x[0].low;
  Pair<T> d = difference(x[c].high, mean);
  d.low = d.low + x[c].low;
  if constexpr (c == 2) {
    const T product = first.high * x[0].high;
    const Pair<T> rest = difference(d.high, product);
    d.low = d.low + (rest.low - multiply_add(first.high, x[0].high, -product));
    d = {rest.high, multiply_add(-first.high, x[0].low, multiply_add(-first.low, x[0].high, d.low))};
  }
  const Pair<T>&by = c == 1 ? first : second, &of = x[c == 2];
  d.low = multiply_add(-by.high, of.low, multiply_add(-by.low, of.high, d.low));
  d.high = multiply_add(-by.high, of.high, d.high);
  return d.high + select(d.low == d.low, d.low, T(ScalarOf<T>(0)));  // low is NaN where high is infinite
}

// A bin, with log-scale s, half width h, i = e^-s, a = i (d + h), b = i (d - h) and y = a - b. P = sigma(a) - sigma(b)
// inside, sigma(a) in the first bin and sigma(-b) in the last. A negative d, and d in the first bin, is mirrored, so
// that b belongs to the near edge. All is computed from e^-|b| and e^-y; e^-y is 0 if there is no far edge. There are
// three steps, so that each may have a loop of its own.
template <class T>
struct Edges {
  T slope, b, y;  // slope: db / dd
};
template <class T>
struct Tails {
  T b, y, f;  // e^-|b|, e^-y, and 1 - e^-y or, for a small y, (1 - e^-y) / y
};
// log P is log(ratio) - exponent. The ratio is far from 0 and from infinity, so that a few ratios can be multiplied
// before a logarithm is taken. The derivatives are by d = x - mean and by the log-scale.
template <class T>
struct LogisticBin {
  T exponent, ratio, by_distance, by_log_scale;
};

template <class S>
constexpr S kFar = sizeof(S) == 4 ? 87 : 700;  // e^-kFar counts as 0; e^-y of a smaller y is a normal number

template <class T>
FASTVAE_INLINE Edges<T> edges_of(T d, T log_scale, T edge, T half_width, T least) {
  using S = ScalarOf<T>;
  const T zero(S(0)), one(S(1)), far(kFar<S>);
  const T i = exponential_of_normal(-at_most(at_least(log_scale, least), T(S(80))));
  const auto inside = edge == zero;
  const T sign = select(inside, select(d < zero, -one, one), edge);
  const T y = select(inside, at_most((half_width + half_width) * i, far), far);
  return {sign * i, i * multiply_add(sign, d, -half_width), y};
}

template <class T>
FASTVAE_INLINE Tails<T> tails_of(const Edges<T>& e) {
  using S = ScalarOf<T>;
  const T one(S(1)), y = e.y;
  const T size = select(e.b > T(S(0)), e.b, -e.b);  // not absolute(): at 0 its derivative is 1
  const T f = multiply_add(-y, Constants<S>::exp_tail(-y), one);
  Tails<T> tails{exponential_of_normal(-at_most(size, T(S(60)))), multiply_add(-y, f, one), f};
  const auto large = y > T(S(0.25));
  if (!any_of(large, y)) return tails;
  const T far = select(y < T(kFar<S>), exponential_of_normal(-y), T(S(0)));
  tails.y = select(large, far, tails.y);
  tails.f = select(large, one - far, f);
  return tails;
}

template <class T>
FASTVAE_INLINE LogisticBin<T> logistic_bin(const Edges<T>& e, const Tails<T>& tails, T log_scale, T half_width,
                                           T least) {
  using S = ScalarOf<T>;
  const T zero(S(0)), one(S(1)), b = e.b, y = e.y, t = tails.b, E = tails.y, width = half_width + half_width;
  const auto positive = b > zero;
  const T n = select(positive, one, t), w = select(positive, t, one);  // e^-b = w / n
  // If f is (1 - E) / y, then y = width e^-s comes back: s in the exponent, width in the ratio.
  const auto large = y > T(S(0.25));
  const T f = tails.f;
  const T u = one + t, m = multiply_add(E, w, n), mu = m * u;
  const T q = quotient(one, mu * f), fq = f * q;
  const T sigma_a = (E * w) * (u * fq), sigma_b = n * (m * fq);  // sigma(-a), sigma(b)
  const T near = at_least(b, T(S(-60)));
  const T by_log_scale =
      (near * sigma_b - at_most(near + y, T(kFar<S>)) * sigma_a) - (select(large, y, one) * E) * (mu * q);
  return {select(positive, b, zero) + select(large, zero, at_least(log_scale, least)),
          (select(large, one, width) * f) * (f * (n * q)), e.slope * (sigma_a - sigma_b),
          select(log_scale < least, zero, by_log_scale)};
}

// The row of component 0's mean of channel c. The row of its log-scale is K further, that of its coefficient 2 K.
FASTVAE_INLINE int mean_row(const Mixture& m, int c) { return m.components * (1 + (m.channels == 3 ? 3 : 2) * c); }

// x scaled to [-1, 1], with more digits than T has.
template <class T>
FASTVAE_INLINE Pair<T> scaled(const Mixture& m, T x) {
  if (m.scale == 1 && m.shift == 0) return {x, T(0)};
  const double exact = static_cast<double>(x) * m.scale + m.shift;
  const T high = static_cast<T>(exact);
  return {high, static_cast<T>(exact - static_cast<double>(high))};
}

// Draws a pixel: the component by the Gumbel-max trick, then the channels in order, each from its logistic and rounded
// to the middle of its bin. parameter(row) reads, word() gives the next random word, draw(c, x) takes channel c.
template <class T, class Parameter, class Word, class Draw>
FASTVAE_INLINE void draw_pixel(const Mixture& m, Parameter parameter, Word word, Draw draw) {
  constexpr int kDigits = sizeof(T) == 4 ? 32 : 53;
  const auto log_of = [](auto w) {  // the log of a uniform number
    return logarithm_of_fraction<kDigits>(number_from_word<T>(w, T()), minus_one_from_word<T>(w, T()));
  };
  const int K = m.components;
  int best = 0;
  T most = -Constants<T>::kInfinity;
  for (int k = 0; k < K; ++k) {
    const T score = parameter(k) - logarithm(-log_of(word()));
    if (score > most || score != score) {  // a NaN stays
      most = score;
      best = k;
    }
  }
  const auto tanh_of = [&](int c) { return coefficient(parameter(mean_row(m, c) + 2 * K + best)).tanh.high; };
  T first(0), second(0);
  for (int c = 0; c < m.channels; ++c) {
    const int row = mean_row(m, c) + best;
    T mean = parameter(row);
    if (c == 1) mean = multiply_add(tanh_of(0), first, mean);
    if (c == 2) mean = multiply_add(tanh_of(2), second, multiply_add(tanh_of(1), first, mean));
    const T scale = exponential(at_most(at_least(parameter(row + K), T(m.least_log_scale)), T(80)));
    const auto w = word();
    T drawn = multiply_add(scale, log_of(w) - log_of(~w), mean);
    if (most != most) drawn = most;
    drawn = at_most(at_least(drawn, T(-1)), T(1));
    const T bin =
        (drawn + T(1)) * static_cast<T>(0.5 / m.half_width) + T(Constants<T>::kRound) - T(Constants<T>::kRound);
    const double middle = static_cast<double>(bin) * (2 * m.half_width);
    if (c == 0) {
      first = static_cast<T>(middle - 1);
    } else {
      second = static_cast<T>(middle - 1);
    }
    draw(c, static_cast<T>(static_cast<double>(bin) * (2 * m.half_width / m.scale) + (-1 - m.shift) / m.scale));
  }
}

FASTVAE_NAMESPACE_END
