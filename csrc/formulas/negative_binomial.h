// The negative binomial: x failures before the theta-th success, of mean mu; theta is the inverse dispersion, and
// theta = infinity is Poisson's. With p = mu / (theta + mu), the probability of a failure, and q = 1 - p,
//   P(x) = Gamma(theta + x) / (Gamma(theta) x!) q^theta p^x.
// In Loader's form (math/gamma.h), with s = q (x - mu), u = s / theta, w = -s / x and phi(f) = f - log(1 + f),
//   -log P(x) = log(2 pi x (1 + x / theta)) / 2 + delta(theta) + delta(x) - delta(theta + x) + theta phi(u) + x phi(w)
// for x > 0, and theta log(1 + mu / theta) for 0. Its derivative by mu is -s / mu, that by theta
//   phi(u) - x / (2 theta (theta + x)) + chi(theta + x) - chi(theta).
// A mu, theta or x below 0 gives NaN, and so does an infinite x.
#pragma once

#include "counts.h"

FASTVAE_NAMESPACE_BEGIN

// Beyond these limits the results stay the same, but intermediate results could overflow.
template <class T>
FASTVAE_INLINE T theta_within_limits(T theta) {
  using S = ScalarOf<T>;
  return at_least(at_most(theta, T(S(1e15))), T(S(1e-18)));
}

// The value for x > 0 and its derivative by theta, for a fixed mu or, if kFixedLogit, for a fixed p.
template <class T>
struct ValueAndSlope {
  T value;
  T d_theta;
};
template <bool kFixedLogit, class T>
FASTVAE_INLINE ValueAndSlope<T> negative_binomial(T x, T theta, T p, T q, T s) {
  using S = ScalarOf<T>;
  const T one = T(1), half = T(S(0.5));
  const T sum = theta + x, per_theta = quotient(one, theta), per_x = quotient(one, x), per_sum = quotient(one, sum);
  const LogParts<T> u = log_parts(sum * (q * per_theta), s * per_theta), w = log_parts(sum * (p * per_x), -s * per_x);
  const auto below = theta < one;
  const bool any_below = any_of(below, theta);
  const T above = any_below ? select(below, theta + one, theta) : theta;
  const Stirling<T> of_theta = stirling(above), of_sum = stirling_of_any(sum);
  T delta = of_theta.delta;
  T slope = (kFixedLogit ? -u.log : u.rest) - half * x * per_theta * per_sum;
  if (any_below) {
    // Shifts theta by 1, as stirling_of_any does. u - 1 / theta, which would cancel, is computed as one fraction.
    const T log = log1p(per_theta);
    const T line = kFixedLogit ? -per_theta : multiply_add(x - one, q, -(p * above)) * per_theta;
    const T shifted = (log - u.log) + line + half * (one - x) * quotient(per_sum, above);
    delta = select(below, delta + ((theta + half) * log - one), delta);
    slope = select(below, shifted, slope);
  }
  const T spread = half * logarithm(T(S(6.28318530717958648)) * x * (sum * per_theta));
  const T value = (spread + (delta + (stirling_of_any(x).delta - of_sum.delta))) + (theta * u.rest + x * w.rest);
  return {value, slope + (of_sum.chi - of_theta.chi)};
}

struct NegativeBinomial : OfCounts<NegativeBinomial> {
  static constexpr const char* kName = "negative_binomial";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"theta", kParameter}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at_zero(const T (&in)[3]) {
    const T mu = nan_if((in[0] < T(0)) | (in[2] < T(0)), in[0]);
    const T theta = theta_within_limits(in[2]), per = quotient(T(1), theta + mu), q = theta * per;
    const LogParts<T> log_q = log_parts_of_probability(q, -(mu * per));
    return {-(theta * log_q.log), {q, T(0), log_q.rest}};
  }
  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at_positive(const T (&in)[3]) {
    const T mu = nan_if((in[0] < T(0)) | (in[2] < T(0)), in[0]), x = nan_if(is_no_count(in[1]), in[1]);
    const T theta = theta_within_limits(in[2]), per = quotient(T(1), theta + mu);
    const T q = theta * per, s = q * (x - mu);
    const auto nb = negative_binomial<false>(x, theta, mu * per, q, s);
    return {nb.value, {quotient(-s, mu), T(0), nb.d_theta}};
  }
};

// The same with l = log(p / q) instead of the mean, as in torch.distributions.NegativeBinomial.
struct NegativeBinomialLogits : OfCounts<NegativeBinomialLogits> {
  static constexpr const char* kName = "negative_binomial_logits";
  static constexpr Argument kInputs[] = {{"recon_x", kMain}, {"x", kData}, {"total_count", kParameter}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at_zero(const T (&in)[3]) {
    const T l = nan_if((in[2] < T(0)) | (in[2] != in[2]), in[0]), theta = theta_within_limits(in[2]);
    const T p = sigmoid(l).value, log = at_least(l, T(0)) + log1p(exponential_of_negative(-absolute(l)));  // -log q
    return {theta * log, {theta * p, T(0), log}};
  }
  template <class T>
  static FASTVAE_INLINE Terms<T, 3> at_positive(const T (&in)[3]) {
    using S = ScalarOf<T>;
    // For |l| > 80, where p or q would underflow, the value is linear in l.
    const T high = at_most(in[0], T(S(80))), l = at_least(high, T(S(-80))), beyond = in[0] - high;
    const T x = nan_if(is_no_count(in[1]) | (in[2] < T(0)), in[1]), theta = theta_within_limits(in[2]);
    const T p = sigmoid(l).value, q = sigmoid(-l).value, s = multiply_add(x, q, -(theta * p));
    const auto nb = negative_binomial<true>(x, theta, p, q, s);
    const T value = nb.value + (theta * beyond + x * (l - high));
    return {value, {-s, T(0), nb.d_theta + beyond}};
  }
};

// What `rounded`, the value of NegativeBinomial::at_zero with its sign changed, lacks of log P(0) = theta log q: the
// rounding errors of q, of its logarithm and of the product.
template <class T>
FASTVAE_INLINE T lost_at_zero(T mu, T theta, T rounded) {
  using S = ScalarOf<T>;
  using C = Constants<S>;
  theta = theta_within_limits(theta);
  const T sum = theta + mu, per = quotient(T(1), sum), q = theta * per, p = mu * per;
  const T back = sum - theta, of_sum = (theta - (sum - back)) + (mu - back);  // Knuth's two-sum
  // The logarithm is high + low + g + tail.
  constexpr int kUp = C::kMantissa + 1;
  const auto s = split<kUp>(q * T(S(uint64_t(1) << kUp)));
  const auto near = s.n == T(0);
  const T g = select(near, -p, s.m - T(1)), tail = g * g * C::log_polynomial(g);
  const T high = s.n * T(C::kLn2Hi), low = s.n * T(C::kLn2Lo), first = g + tail, second = first + low;
  const T log = log_parts_of_probability(q, -p).log;
  const T of_log = ((high - log) + second) + ((low - (second - first)) + (tail - (first - g)));
  const T of_q = select(near, multiply_add(p, sum, -mu) + p * of_sum, multiply_add(-q, sum, theta) - q * of_sum);
  const T lost = multiply_add(theta, log, -rounded) + multiply_add(theta, of_log, of_q);
  return select(lost == lost, lost, T(0));  // NaN where log P(0) is infinite
}

// A count is set to 0 with the probability sigmoid(l), l = zero_logits: P(0) = (a + b q^theta) / (a + b), where a and b
// are 1 and e^-|l| (l < 0: reversed). (Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018.)
struct ZeroInflated : OfCounts<ZeroInflated> {
  static constexpr const char* kName = "zero_inflated_negative_binomial";
  static constexpr Argument kInputs[] = {
      {"recon_x", kMain}, {"x", kData}, {"theta", kParameter}, {"zero_logits", kParameter}};

  template <class T>
  static FASTVAE_INLINE Terms<T, 4> at_zero(const T (&in)[4]) {
    using S = ScalarOf<T>;
    const T l = in[3], zero = T(0), one = T(1);
    const Terms<T, 3> nb = NegativeBinomial::at_zero<T>({in[0], in[1], in[2]});
    const T log_nb = -nb.value;
    const ExpWithExpm1<T> power = exp_with_expm1(log_nb);
    T e = power.exp, e_minus_one = power.expm1;
    const auto deep = log_nb < T(S(-2));  // here a rounding error of log_nb is a larger relative error of e
    if (any_of(deep, l)) {
      const T lost = select(deep, e * lost_at_zero(in[0], in[2], log_nb), zero);
      e = e + lost;
      e_minus_one = e_minus_one + lost;
    }
    const T t = exponential_of_negative(-absolute(l));
    const auto negative = l < zero;
    const T a = select(negative, t, one), b = select(negative, one, t), per = quotient(one, one + t);
    const T share = multiply_add(b, e, a), per_share = quotient(one, share);
    const T other = b * e_minus_one * per;  // P(0) - 1
    const T zeros = share * per;
    T value = -log_parts_of_probability(zeros, other).log, rho = b * e * per_share, d_logit = a * per_share * other;
    const auto tiny = zeros < T(S(1e-30));  // the terms of P(0) underflow, their logarithms do not
    if (any_of(tiny, l)) {
      const T gap = guarded(tiny, log_nb - l), far = exponential_of_negative(-absolute(gap)),
              part = quotient(one, one + far);
      const auto less = gap < zero;
      value = select(tiny, -(select(less, l, log_nb) + log1p(far)), value);
      rho = select(tiny, select(less, far * part, part), rho);
      d_logit = select(tiny, -select(less, part, far * part), d_logit);
    }
    return {value, {rho * nb.d[0], zero, rho * nb.d[2], d_logit}};
  }
  template <class T>
  static FASTVAE_INLINE Terms<T, 4> at_positive(const T (&in)[4]) {
    const T l = in[3], zero = T(0);
    const Terms<T, 3> nb = NegativeBinomial::at_positive<T>({in[0], in[1], in[2]});
    return {nb.value + (at_least(l, zero) + log1p(exponential_of_negative(-absolute(l)))),
            {nb.d[0], zero, nb.d[2], sigmoid(l).value}};
  }
};

FASTVAE_NAMESPACE_END
