// The pass over the latents: a sample, the KL divergence, their gradients, or what is wanted of them together. Reads
// each parameter once and writes each result once; noise is made in registers, in the backward pass once more. Bound by
// instructions as much as by memory where it draws: some 300 for four normals and what is made of them.
#pragma once

#include "../math/gaussian.h"
#include "noise.cuh"
#include "reduce.cuh"

namespace fastvae::cuda {

// Turns an element's derivative into the gradient of its tensor, as on the CPU (cpu/kernels.cpp): one that was made in
// the forward pass has been rounded to its tensor's dtype before the upstream gradient came.
template <class T>
struct Gradient {
  T scale;
  bool round;  // a bfloat16 tensor, whose gradient may have been made in the forward pass

  FASTVAE_DEVICE T operator()(T derivative, bool has_upstream, T upstream) const {
    T g = scale * derivative;
    if (has_upstream) {
      if (round) {
        BFloat16 narrowed;
        narrow(g, narrowed);
        g = static_cast<T>(widen(narrowed));
      }
      g = g * upstream;
    }
    return g;
  }
};

template <class Access>
struct KlOperands {
  typename Access::Operand mu, logvar, upstream, value, d_mu, d_logvar;
  typename Access::Shape shape;
  double scale = 1;
  Number weight;
  // The bfloat16 ones, if their gradients may be kept.
  bool round_mu = false, round_logvar = false, round_mu_p = false, round_logvar_p = false;
};

template <class Access>
struct LatentOperands : KlOperands<Access> {
  typename Access::Operand mu_p, logvar_p, eps, z, dz, d_mu_p, d_logvar_p, d_eps;
  bool eps_is_wide = false;  // of the arithmetic's type, where the latents have 16 bits
  Noise noise;
};

template <class Access>
struct LatentParams {
  LatentOperands<Access> operands;
  Work work;
  Target target;
};

// The pack `pack`; returns the sum of its values.
template <class Access, class S, class T, Prior kPrior, bool kSample, bool kGradient, class Operands>
FASTVAE_DEVICE T latent_pack(const Operands& o, int64_t pack, T scale, uint64_t seed, uint64_t offset) {
  constexpr int W = Access::kWidth;
  const auto at = Access::place(o.shape, pack);
  // All that is read is on its way before any of it is used.
  typename Access::template Loaded<S> mu_loaded, mu_p_loaded, logvar_p_loaded, dz_loaded;
  const auto logvar_loaded = Access::template load<S>(o.logvar, at);
  if constexpr (kPrior != Prior::none || !kGradient) mu_loaded = Access::template load<S>(o.mu, at);
  if constexpr (kPrior == Prior::given) {
    mu_p_loaded = Access::template load<S>(o.mu_p, at);
    logvar_p_loaded = Access::template load<S>(o.logvar_p, at);
  }
  T eps[W], up[W];
  if constexpr (kSample) {
    if constexpr (kGradient) dz_loaded = Access::template load<S>(o.dz, at);
    if (!o.eps) {
      draw_pack(seed, offset, pack * W, eps);
    } else if (o.eps_is_wide) {
      Access::template unpack<T>(Access::template load<T>(o.eps, at), eps);
    } else {
      Access::template unpack<S>(Access::template load<S>(o.eps, at), eps);
    }
  }
  if constexpr (kPrior != Prior::none && kGradient) {
    if (o.upstream) Access::load_upstream(o.upstream, at, up);
  }

  T mu[W], logvar[W], mu_p[W], logvar_p[W], dz[W];
  Access::template unpack<S>(logvar_loaded, logvar);
  if constexpr (kPrior != Prior::none || !kGradient) Access::template unpack<S>(mu_loaded, mu);
  if constexpr (kPrior == Prior::given) {
    Access::template unpack<S>(mu_p_loaded, mu_p);
    Access::template unpack<S>(logvar_p_loaded, logvar_p);
  }
  if constexpr (kSample && kGradient) Access::template unpack<S>(dz_loaded, dz);

  T z[W], value[W], d_mu[W], d_logvar[W], d_mu_p[W], d_logvar_p[W], d_eps[W];
  FASTVAE_UNROLL
  for (int j = 0; j < W; ++j) {
    T g_mu = 0, g_logvar = 0, sigma = 0;
    if constexpr (kSample) sigma = standard_deviation(logvar[j]);
    if constexpr (kPrior != Prior::none) {
      Kl<T> kl;
      if constexpr (kPrior == Prior::standard) {
        kl = kl_standard(mu[j], logvar[j], kSample ? sigma * sigma : exponential(logvar[j]));
      } else {
        kl = kl_between(mu[j], logvar[j], mu_p[j], logvar_p[j]);
      }
      value[j] = kl.value;
      if constexpr (kGradient) {
        const bool has_upstream = static_cast<bool>(o.upstream);
        g_mu = Gradient<T>{scale, o.round_mu}(kl.d_mu, has_upstream, up[j]);
        g_logvar = Gradient<T>{scale, o.round_logvar}(kl.d_logvar, has_upstream, up[j]);
        if constexpr (kPrior == Prior::given) {
          d_mu_p[j] = Gradient<T>{scale, o.round_mu_p}(kl.d_mu_p, has_upstream, up[j]);
          d_logvar_p[j] = Gradient<T>{scale, o.round_logvar_p}(kl.d_logvar_p, has_upstream, up[j]);
        }
      }
    }
    if constexpr (kSample) {
      if constexpr (kGradient) {
        g_mu = dz[j] + g_mu;
        g_logvar = dz[j] * sample_d_logvar(sigma, eps[j]) + g_logvar;
        d_eps[j] = dz[j] * sigma;
      } else {
        z[j] = sample(mu[j], sigma, eps[j]);
      }
    }
    d_mu[j] = g_mu;
    d_logvar[j] = g_logvar;
  }

  if constexpr (kSample && !kGradient) Access::template store<S>(o.z, at, z);
  T sum = 0;
  if constexpr (kPrior != Prior::none) {
    sum = pack_sum(value);
    if (o.value) Access::template store<T>(o.value, at, value);
  }
  if constexpr (kGradient) {
    if (o.d_mu) Access::template store<S>(o.d_mu, at, d_mu);
    if (o.d_logvar) Access::template store<S>(o.d_logvar, at, d_logvar);
    if constexpr (kPrior == Prior::given) {
      if (o.d_mu_p) Access::template store<S>(o.d_mu_p, at, d_mu_p);
      if (o.d_logvar_p) Access::template store<S>(o.d_logvar_p, at, d_logvar_p);
    }
    if constexpr (kSample) {
      if (o.d_eps && o.eps_is_wide) {
        Access::template store<T>(o.d_eps, at, d_eps);
      } else if (o.d_eps) {
        Access::template store<S>(o.d_eps, at, d_eps);
      }
    }
  }
  return sum;
}

template <class Access, class S, class T, Prior kPrior, bool kSample, bool kGradient, class Operands>
struct LatentPass {
  const Operands& operands;
  T scale;
  uint64_t seed, offset;

  template <int>
  FASTVAE_DEVICE T packs(int64_t pack, int) const {
    return latent_pack<Access, S, T, kPrior, kSample, kGradient>(operands, pack, scale, seed, offset);
  }
  FASTVAE_DEVICE T single(int64_t element) const {
    return latent_pack<SinglesOf<Access>, S, T, kPrior, kSample, kGradient>(operands, element, scale, seed, offset);
  }
};

// As many blocks as there are registers for without spilling: fewer for packs of eight, fewest where a prior's
// gradients meet a sample's.
template <class Access, class T, Prior kPrior, bool kSample, bool kGradient>
constexpr int latent_blocks() {
  if (sizeof(T) == 8 || Access::kWidth == 1) return kResidentBlocks<T>;
  if (kPrior == Prior::given && kSample && kGradient) return Access::kWidth == 8 ? 1 : 3;
  return Access::kWidth < 8 ? kResidentBlocks<T> : kPrior == Prior::given && kSample ? 2 : 3;
}

template <class Access, class S, Prior kPrior, bool kSample, bool kGradient>
__global__ void __launch_bounds__(kThreads, latent_blocks<Access, Arithmetic<S>, kPrior, kSample, kGradient>())
    latent_kernel(const __grid_constant__ LatentParams<Access> p) {
  using T = Arithmetic<S>;
  const auto& o = p.operands;
  const T scale = static_cast<T>(kPrior == Prior::none ? 1 : o.scale * value_of(o.weight));
  uint64_t seed = 0, offset = 0;
  if constexpr (kSample) {
    seed = seed_of(o.noise);
    offset = offset_of(o.noise);
    if (o.noise.keep != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
      o.noise.keep[0] = static_cast<int64_t>(seed);
      o.noise.keep[1] = static_cast<int64_t>(offset);
    }
  }
  const LatentPass<Access, S, T, kPrior, kSample, kGradient, LatentOperands<Access>> pass{o, scale, seed, offset};
  for_each_item<1>(p.work, Access::kWidth, static_cast<int>(blockIdx.x), pass, p.target);
}

// ---- On the host.

// An operand for Access from a view: what Rows does for Vectors.
template <class T>
typename Elements<T>::Operand element_operand(const View& view) {
  typename Elements<T>::Operand operand;
  static_cast<View&>(operand) = view;
  return operand;
}

template <class Access>
void set_scalars(KlOperands<Access>& o, const LatentArgs& args) {
  const auto rounds = [&](const View& of) { return args.may_be_kept && of.dtype == DType::bfloat16; };
  o.scale = args.scale;
  o.weight = args.weight;
  o.round_mu = rounds(args.mu);
  o.round_logvar = rounds(args.logvar);
  o.round_mu_p = rounds(args.mu_p);
  o.round_logvar_p = rounds(args.logvar_p);
}

template <class T>
KlOperands<Elements<T>> kl_elements(const LatentArgs& args) {
  KlOperands<Elements<T>> o;
  o.mu = element_operand<T>(args.mu);
  o.logvar = element_operand<T>(args.logvar);
  o.upstream = element_operand<T>(args.upstream);
  o.value = element_operand<T>(args.value);
  o.d_mu = element_operand<T>(args.d_mu);
  o.d_logvar = element_operand<T>(args.d_logvar);
  set_scalars(o, args);
  return o;
}

template <class Access, class S, Prior kPrior>
cudaError_t launch_latent(const LatentOperands<Access>& operands, const LatentArgs& args, int64_t numel,
                          const Sums& sums, const Launch& launch) {
  LatentParams<Access> params;
  params.operands = operands;
  params.work = share_out(numel, sums, Access::kWidth, 1, launch);
  params.target = target_of(params.work, sums, launch.partials);
  if (params.work.blocks == 0) return cudaSuccess;
  const bool sample = args.z.data != nullptr || args.dz.data != nullptr;
  const bool gradient = args.d_mu.data != nullptr || args.d_logvar.data != nullptr || args.d_mu_p.data != nullptr ||
                        args.d_logvar_p.data != nullptr || args.d_eps.data != nullptr;
  void (*kernel)(LatentParams<Access>) = nullptr;
  if (sample) {
    kernel = gradient ? latent_kernel<Access, S, kPrior, true, true> : latent_kernel<Access, S, kPrior, true, false>;
  } else if constexpr (kPrior != Prior::none) {
    kernel = gradient ? latent_kernel<Access, S, kPrior, false, true> : latent_kernel<Access, S, kPrior, false, false>;
  }
  if (kernel == nullptr) return cudaErrorInvalidValue;  // nothing was asked for
  if (const cudaError_t error = enqueue(kernel, params.work.blocks, params, launch);
      error != cudaSuccess || params.target.partials == nullptr)
    return error;
  return finish({}, {}, params.work, params.target, {}, launch);
}

template <class Access, class S>
cudaError_t launch_latent(const LatentOperands<Access>& operands, const LatentArgs& args, int64_t numel,
                          const Sums& sums, const Launch& launch) {
  switch (args.prior) {
    case Prior::none:
      return launch_latent<Access, S, Prior::none>(operands, args, numel, sums, launch);
    case Prior::standard:
      return launch_latent<Access, S, Prior::standard>(operands, args, numel, sums, launch);
    case Prior::given:
      return launch_latent<Access, S, Prior::given>(operands, args, numel, sums, launch);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t latent_elements(const LatentArgs& args, int64_t numel, const Sums& sums, const Launch& launch) {
  LatentOperands<Elements<T>> o;
  static_cast<KlOperands<Elements<T>>&>(o) = kl_elements<T>(args);
  o.mu_p = element_operand<T>(args.mu_p);
  o.logvar_p = element_operand<T>(args.logvar_p);
  o.eps = element_operand<T>(args.eps);
  o.z = element_operand<T>(args.z);
  o.dz = element_operand<T>(args.dz);
  o.d_mu_p = element_operand<T>(args.d_mu_p);
  o.d_logvar_p = element_operand<T>(args.d_logvar_p);
  o.d_eps = element_operand<T>(args.d_eps);
  o.noise = args.noise;
  return launch_latent<Elements<T>, T>(o, args, numel, sums, launch);
}

// The instances are spread over several files, to be compiled side by side.
extern template cudaError_t latent_elements<float>(const LatentArgs&, int64_t, const Sums&, const Launch&);
extern template cudaError_t latent_elements<double>(const LatentArgs&, int64_t, const Sums&, const Launch&);

// Latents of dtype S: with 16-byte accesses if the layout lets it, else element by element.
template <class S>
cudaError_t latent_as(const LatentArgs& args, int64_t numel, const Sums& sums, const Launch& launch) {
  constexpr DType dtype = kDType<S>;
  constexpr int W = 16 / sizeof(S);
  constexpr DType kResult = kDType<Arithmetic<S>>;
  Rows<W> rows(numel, {&args.mu, &args.logvar, &args.mu_p, &args.logvar_p, &args.eps, &args.dz, &args.upstream,
                       &args.value, &args.z, &args.d_mu, &args.d_logvar, &args.d_mu_p, &args.d_logvar_p, &args.d_eps});
  LatentOperands<Vectors<W>> o;
  o.mu = rows.operand(args.mu, dtype);
  o.logvar = rows.operand(args.logvar, dtype);
  o.mu_p = rows.operand(args.mu_p, dtype);
  o.logvar_p = rows.operand(args.logvar_p, dtype);
  o.eps_is_wide = args.eps.dtype != dtype;
  o.eps = rows.operand(args.eps, o.eps_is_wide ? kResult : dtype);
  o.d_eps = rows.operand(args.d_eps, o.eps_is_wide ? kResult : dtype);
  o.dz = rows.operand(args.dz, dtype);
  o.upstream = rows.operand(args.upstream, kResult, /*may_broadcast=*/true);
  o.value = rows.operand(args.value, kResult);
  o.z = rows.operand(args.z, dtype);
  o.d_mu = rows.operand(args.d_mu, dtype);
  o.d_logvar = rows.operand(args.d_logvar, dtype);
  o.d_mu_p = rows.operand(args.d_mu_p, dtype);
  o.d_logvar_p = rows.operand(args.d_logvar_p, dtype);
  rows.sum_over(sums);
  if (!rows.fit()) return latent_elements<Arithmetic<S>>(args, numel, sums, launch);
  o.shape = rows.shape();
  set_scalars(o, args);
  o.noise = args.noise;
  return launch_latent<Vectors<W>, S>(o, args, numel, sums, launch);
}

extern template cudaError_t latent_as<float>(const LatentArgs&, int64_t, const Sums&, const Launch&);
extern template cudaError_t latent_as<double>(const LatentArgs&, int64_t, const Sums&, const Launch&);
extern template cudaError_t latent_as<BFloat16>(const LatentArgs&, int64_t, const Sums&, const Launch&);
extern template cudaError_t latent_as<Float16>(const LatentArgs&, int64_t, const Sums&, const Launch&);

}  // namespace fastvae::cuda
