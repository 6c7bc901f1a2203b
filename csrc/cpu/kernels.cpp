// The fused loops: which tensors a pass reads and writes. The formulas are math/'s, the way through memory is
// blocks.h's. Compiled once for each instruction set; FASTVAE_ISA and FASTVAE_KERNELS name this copy.
#include "kernels.h"

#include "../math/gaussian.h"
#include "../math/likelihood.h"
#include "blocks.h"
#include "noise.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
Vec<T> lane_numbers() {
  alignas(64) T lanes[Vec<T>::kLanes];
  for (int l = 0; l < Vec<T>::kLanes; ++l) lanes[l] = static_cast<T>(l);
  return Vec<T>::load(lanes);
}

// Calls step(j) for each vector of a block. A light step is worth unrolling, a heavy one is not worth the code.
template <class T, bool kUnroll, class Step>
FASTVAE_INLINE void for_each_vector(int n, Step step) {
  constexpr int w = Vec<T>::kLanes;
  int j = 0;
  if constexpr (kUnroll) {
    for (; j + 2 * w <= n; j += 2 * w) {
      step(j);
      step(j + w);
    }
  }
  for (; j < n; j += w) step(j);
}

// A sum in T over a block, in 64 columns (32 of double) and so at most 8 additions deep, and in double over the blocks.
// Element j of a block belongs to column j % 64 whatever the width of the vectors.
template <class T>
class Sum {
 public:
  FASTVAE_INLINE void begin_block() {
    for (int c = 0; c < kColumns; c += Vec<T>::kLanes) Vec<T>(0).store(column_ + c);
  }
  FASTVAE_INLINE void add(int j, Vec<T> value) {
    T* column = column_ + j % kColumns;
    (Vec<T>::load(column) + value).store(column);
  }
  FASTVAE_INLINE void end_block() {
    constexpr int q = kColumns / 4;
    for (int l = 0; l < q; ++l)
      total_[l] += static_cast<double>((column_[l] + column_[q + l]) + (column_[2 * q + l] + column_[3 * q + l]));
  }
  double total() const {
    double sum = 0;
    for (double lane : total_) sum += lane;
    return sum;
  }

 private:
  static constexpr int kColumns = 256 / sizeof(T);
  alignas(64) T column_[kColumns];
  double total_[kColumns / 4] = {};
};

// Sums of short events, from a buffer of their elements' values.
template <class T>
void sum_events(const T* value, int n, int64_t event, double* sums) {
  for (const T* end = value + n; value < end; value += event) {
    double part[4] = {};
    int64_t j = 0;
    for (; j + 4 <= event; j += 4)
      for (int k = 0; k < 4; ++k) part[k] += static_cast<double>(value[j + k]);
    for (; j < event; ++j) part[0] += static_cast<double>(value[j]);
    *sums++ = (part[0] + part[1]) + (part[2] + part[3]);
  }
}

// Turns an element's derivative into the gradient of its tensor: times the reduction's scale, times the upstream
// gradient. A gradient that was made in the forward pass has been rounded to its tensor's dtype between the two, so one
// that is made anew is rounded there as well, and both agree to the bit. (float16 gradients are never made in the
// forward pass.)
template <class T>
class Gradient {
 public:
  Gradient(double scale, const View& tensor, bool may_be_kept)
      : scale_(static_cast<T>(scale)), round_(may_be_kept && tensor.dtype == DType::bfloat16) {}

  FASTVAE_INLINE Vec<T> operator()(Vec<T> derivative, const T* upstream) const {
    Vec<T> g = scale_ * derivative;
    if (upstream != nullptr) {
      if (round_) g = rounded(g);
      g = g * Vec<T>::load(upstream);
    }
    return g;
  }

 private:
  static FASTVAE_INLINE Vec<float> rounded(Vec<float> g) { return rounded_to_bfloat16(g); }
  static FASTVAE_INLINE Vec<double> rounded(Vec<double> g) {
    for (auto& part : g.part)
      for (size_t l = 0; l < sizeof(part) / sizeof(double); ++l)
        part[l] = rounded_to_bfloat16(static_cast<float>(part[l]));
    return g;
  }

  Vec<T> scale_;
  bool round_;
};

// Runs a pass over the blocks of [begin, end): pass(i, n, values, sum) computes the elements [i, i + n), adds their
// values to sum and stores them to `values` unless it is nullptr.
template <class T, class Pass>
FASTVAE_INLINE void for_each_block(const LossArgs& args, int64_t event, int64_t begin, int64_t end, double* sums,
                                   Pass pass) {
  Output<T> value(args.value);
  Sum<T> sum;
  alignas(64) T buffer[kBlock];
  const int whole_events = event > 0 ? static_cast<int>(kBlock / event * event) : kBlock;
  for (int64_t i = begin; i < end;) {
    int n = end - i < whole_events ? static_cast<int>(end - i) : whole_events;
    if (event == 0 && n > kAlign) n -= n % kAlign;  // leaves a ragged end to a block of its own
    sum.begin_block();
    pass(i, n, event > 0 ? buffer : value.write(i, n), sum);
    sum.end_block();
    if (event > 0) {
      sum_events(buffer, n, event, sums + (i - begin) / event);
    } else {
      value.flush();
    }
    i += n;
  }
  if (event == 0 && sums != nullptr) *sums = sum.total();
}

template <class T, class Nll>
void reconstruction_as(const ReconstructionArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  using V = Vec<T>;
  Input<T> recon_x(args.recon_x), x(args.x), upstream(args.upstream);
  Output<T> d_recon_x(args.d_recon_x), d_x(args.d_x);
  const Gradient<T> gradient_recon_x(args.scale, args.d_recon_x, args.may_be_kept),
      gradient_x(args.scale, args.d_x, args.may_be_kept);
  const V lanes = lane_numbers<T>();
  for_each_block<T>(args, event, begin, end, sums, [&](int64_t i, int n, T* values, Sum<T>& sum) {
    const T *from_recon_x = recon_x.read(i, n), *from_x = x.read(i, n), *up = upstream.read(i, n);
    T *to_recon_x = d_recon_x.write(i, n), *to_x = d_x.write(i, n);
    for_each_vector<T, true>(n, [&](int j) __attribute__((always_inline)) {
      const V r = V::load(from_recon_x + j), t = V::load(from_x + j);
      V value = Nll::value(r, t);
      if (values != nullptr) value.store(values + j);
      if (j + V::kLanes > n) value = select(lanes < V(static_cast<T>(n - j)), value, V(0));
      sum.add(j, value);
      const T* u = up == nullptr ? nullptr : up + j;
      if (to_recon_x != nullptr) gradient_recon_x(Nll::d_recon_x(r, t), u).store(to_recon_x + j);
      if (to_x != nullptr) gradient_x(Nll::d_x(r, t), u).store(to_x + j);
    });
    d_recon_x.flush();
    d_x.flush();
  });
}

template <class T>
void reconstruction_of(const ReconstructionArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  switch (args.likelihood) {
    case Likelihood::mse:
      return reconstruction_as<T, SquaredError>(args, event, begin, end, sums);
    case Likelihood::gaussian:
      return reconstruction_as<T, UnitGaussian>(args, event, begin, end, sums);
  }
}

void reconstruction(const ReconstructionArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  return args.float64 ? reconstruction_of<double>(args, event, begin, end, sums)
                      : reconstruction_of<float>(args, event, begin, end, sums);
}

template <class T, Prior kPrior, bool kSample, bool kGradient>
void latent_as(const LatentArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  using V = Vec<T>;
  Input<T> mu(args.mu), logvar(args.logvar), mu_p(args.mu_p), logvar_p(args.logvar_p), given(args.eps), dz(args.dz),
      upstream(args.upstream);
  Output<T> z(args.z), d_mu(args.d_mu), d_logvar(args.d_logvar), d_mu_p(args.d_mu_p), d_logvar_p(args.d_logvar_p),
      d_eps(args.d_eps);
  const Gradient<T> gradient_mu(args.scale, args.d_mu, args.may_be_kept),
      gradient_logvar(args.scale, args.d_logvar, args.may_be_kept),
      gradient_mu_p(args.scale, args.d_mu_p, args.may_be_kept),
      gradient_logvar_p(args.scale, args.d_logvar_p, args.may_be_kept);
  const V lanes = lane_numbers<T>();
  const uint64_t seed = seed_of(args.noise), offset = offset_of(args.noise);
  alignas(64) T noise[kBlock];
  for_each_block<T>(args, event, begin, end, sums, [&](int64_t i, int n, T* values, Sum<T>& sum) {
    const T *from_mu = mu.read(i, n), *from_logvar = logvar.read(i, n), *from_mu_p = mu_p.read(i, n),
            *from_logvar_p = logvar_p.read(i, n), *from_dz = dz.read(i, n), *up = upstream.read(i, n), *eps = nullptr;
    if constexpr (kSample) {
      eps = given.read(i, n);
      if (eps == nullptr) {
        fill_normal(seed, offset, static_cast<uint64_t>(i), n, noise);
        eps = noise;
      }
    }
    T *to_z = z.write(i, n), *to_mu = d_mu.write(i, n), *to_logvar = d_logvar.write(i, n),
      *to_mu_p = d_mu_p.write(i, n), *to_logvar_p = d_logvar_p.write(i, n), *to_eps = d_eps.write(i, n);
    for_each_vector<T, false>(n, [&](int j) __attribute__((always_inline)) {
      const V l = V::load(from_logvar + j);
      V g_mu(0), g_logvar(0), sigma(0);
      if constexpr (kSample) sigma = standard_deviation(l);
      if constexpr (kPrior != Prior::none) {
        Kl<V> kl;
        if constexpr (kPrior == Prior::standard) {
          kl = kl_standard(V::load(from_mu + j), l, kSample ? sigma * sigma : exponential(l));
        } else {
          kl = kl_between(V::load(from_mu + j), l, V::load(from_mu_p + j), V::load(from_logvar_p + j));
        }
        if (values != nullptr) kl.value.store(values + j);
        if (j + V::kLanes > n) kl.value = select(lanes < V(static_cast<T>(n - j)), kl.value, V(0));
        sum.add(j, kl.value);
        if constexpr (kGradient) {
          const T* u = up == nullptr ? nullptr : up + j;
          g_mu = gradient_mu(kl.d_mu, u);
          g_logvar = gradient_logvar(kl.d_logvar, u);
          if (to_mu_p != nullptr) gradient_mu_p(kl.d_mu_p, u).store(to_mu_p + j);
          if (to_logvar_p != nullptr) gradient_logvar_p(kl.d_logvar_p, u).store(to_logvar_p + j);
        }
      }
      if constexpr (kSample) {
        const V e = V::load(eps + j);
        if constexpr (kGradient) {
          const V g = V::load(from_dz + j);
          g_mu = g + g_mu;
          g_logvar = g * sample_d_logvar(sigma, e) + g_logvar;
          if (to_eps != nullptr) (g * sigma).store(to_eps + j);
        } else {
          sample(V::load(from_mu + j), sigma, e).store(to_z + j);
        }
      }
      if constexpr (kGradient) {
        if (to_mu != nullptr) g_mu.store(to_mu + j);
        if (to_logvar != nullptr) g_logvar.store(to_logvar + j);
      }
    });
    z.flush();
    d_mu.flush();
    d_logvar.flush();
    d_mu_p.flush();
    d_logvar_p.flush();
    d_eps.flush();
  });
}

template <class T, Prior kPrior>
void latent_with(const LatentArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  const bool sample = args.z.data != nullptr || args.dz.data != nullptr;
  const bool gradient = args.d_mu.data != nullptr || args.d_logvar.data != nullptr || args.d_mu_p.data != nullptr ||
                        args.d_logvar_p.data != nullptr || args.d_eps.data != nullptr;
  if (sample) {
    return gradient ? latent_as<T, kPrior, true, true>(args, event, begin, end, sums)
                    : latent_as<T, kPrior, true, false>(args, event, begin, end, sums);
  }
  if constexpr (kPrior != Prior::none) {
    return gradient ? latent_as<T, kPrior, false, true>(args, event, begin, end, sums)
                    : latent_as<T, kPrior, false, false>(args, event, begin, end, sums);
  }
}

template <class T>
void latent_of(const LatentArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  switch (args.prior) {
    case Prior::none:
      return latent_with<T, Prior::none>(args, event, begin, end, sums);
    case Prior::standard:
      return latent_with<T, Prior::standard>(args, event, begin, end, sums);
    case Prior::given:
      return latent_with<T, Prior::given>(args, event, begin, end, sums);
  }
}

void latent(const LatentArgs& args, int64_t event, int64_t begin, int64_t end, double* sums) {
  return args.float64 ? latent_of<double>(args, event, begin, end, sums)
                      : latent_of<float>(args, event, begin, end, sums);
}

template <class T>
void normal_of(const NormalArgs& args, int64_t begin, int64_t end) {
  Output<T> out(args.out);
  const uint64_t seed = seed_of(args.noise), offset = offset_of(args.noise);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    fill_normal(seed, offset, args.start + static_cast<uint64_t>(i), n, out.write(i, n));
    out.flush();
  }
}

void normal(const NormalArgs& args, int64_t begin, int64_t end) {
  return args.out.dtype == DType::float64 ? normal_of<double>(args, begin, end) : normal_of<float>(args, begin, end);
}

template <class T>
void scale_as(const View& tensor, T factor, int64_t begin, int64_t end) {
  Input<T> from(tensor);
  Output<T> to(tensor);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    const T* source = from.read(i, n);
    T* target = to.write(i, n);
    for_each_vector<T, false>(n, [&](int j) { (Vec<T>::load(source + j) * Vec<T>(factor)).store(target + j); });
    to.flush();
  }
}

void scale(const View& tensor, double factor, int64_t begin, int64_t end) {
  return tensor.dtype == DType::float64 ? scale_as<double>(tensor, factor, begin, end)
                                        : scale_as<float>(tensor, static_cast<float>(factor), begin, end);
}

FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Kernels FASTVAE_KERNELS = {FASTVAE_ISA::reconstruction, FASTVAE_ISA::latent, FASTVAE_ISA::normal,
                                 FASTVAE_ISA::scale};
}
