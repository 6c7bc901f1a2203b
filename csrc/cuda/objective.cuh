// The pass over the images, and over the latents' KL divergence beside it: reconstruction_loss and vae_loss. Reads
// recon_x and x once and writes their gradients while the values are in registers. The first blocks take the latents,
// as they are done soon, the others the images: there the memory bus is the limit, with some 60 instructions for 48
// bytes.
#pragma once

#include "../math/likelihood.h"
#include "latent.cuh"

namespace fastvae::cuda {

template <class Access>
struct ReconstructionOperands {
  typename Access::Operand recon_x, x, upstream, value, d_recon_x, d_x;
  typename Access::Shape shape;
  double scale = 1;
  bool round_recon_x = false, round_x = false;
};

template <class Access, class T>
struct ObjectiveParams {
  ReconstructionOperands<Access> recon;
  Work recon_work;
  Target recon_target;
  KlOperands<Elements<T>> kl;
  Work kl_work;
  Target kl_target;
  Combination combination;  // its loss: only if all is done by one block
};

// kCount packs, `distance` apart: their values, of which it returns the sum, and the gradients made in the forward
// pass; or (kBackward) the gradients alone, times the upstream gradient.
template <int kCount, class Access, class R, class X, class Nll, bool kBackward, class T, class Operands>
FASTVAE_DEVICE T reconstruction_packs(const Operands& o, T scale, int64_t first, int distance) {
  constexpr int W = Access::kWidth;
  typename Access::Place at[kCount];
  typename Access::template Loaded<R> recon_x_loaded[kCount];
  typename Access::template Loaded<X> x_loaded[kCount];
  // All that is read is on its way before any of it is used.
  FASTVAE_UNROLL
  for (int u = 0; u < kCount; ++u) {
    at[u] = Access::place(o.shape, first + u * distance);
    recon_x_loaded[u] = Access::template load<R>(o.recon_x, at[u]);
    x_loaded[u] = Access::template load<X>(o.x, at[u]);
  }
  T sum = 0;
  const Gradient<T> gradient_recon_x{scale, o.round_recon_x}, gradient_x{scale, o.round_x};
  FASTVAE_UNROLL
  for (int u = 0; u < kCount; ++u) {
    T recon_x[W], x[W], up[W], made[W];
    Access::template unpack<R>(recon_x_loaded[u], recon_x);
    Access::template unpack<X>(x_loaded[u], x);
    if constexpr (kBackward) {
      Access::load_upstream(o.upstream, at[u], up);
    } else {
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) made[j] = Nll::value(recon_x[j], x[j]);
      sum += pack_sum(made);
      if (o.value) Access::template store<T>(o.value, at[u], made);
    }
    // One result after the other: all at once would not fit into the registers.
    if (o.d_recon_x) {
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) made[j] = gradient_recon_x(Nll::d_recon_x(recon_x[j], x[j]), kBackward, up[j]);
      Access::template store<R>(o.d_recon_x, at[u], made);
    }
    if (o.d_x) {
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) made[j] = gradient_x(Nll::d_x(recon_x[j], x[j]), kBackward, up[j]);
      Access::template store<X>(o.d_x, at[u], made);
    }
  }
  return sum;
}

template <class Access, class R, class X, class Nll, bool kBackward>
struct ReconstructionPass {
  using T = Arithmetic<R>;
  const ReconstructionOperands<Access>& operands;
  T scale;

  template <int kCount>
  FASTVAE_DEVICE T packs(int64_t first, int distance) const {
    return reconstruction_packs<kCount, Access, R, X, Nll, kBackward>(operands, scale, first, distance);
  }
  FASTVAE_DEVICE T single(int64_t element) const {
    return reconstruction_packs<1, SinglesOf<Access>, R, X, Nll, kBackward>(operands, scale, element, 1);
  }
};

// Packs that a thread has on their way at a time: as many as fit into the registers without spilling.
template <class Access>
constexpr int kUnroll = Access::kWidth == 8 || Access::kWidth == 1 ? 1 : 2;

template <class Access, class R, class X, class Nll, bool kBackward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Arithmetic<R>>)
    objective_kernel(const __grid_constant__ ObjectiveParams<Access, Arithmetic<R>> p) {
  using T = Arithmetic<R>;
  const int block = static_cast<int>(blockIdx.x);
  const bool alone = p.combination.loss != nullptr;  // one block for both
  double recon = 0, kl = 0;
  if (alone || block >= p.kl_work.blocks) {
    const ReconstructionPass<Access, R, X, Nll, kBackward> pass{p.recon, static_cast<T>(p.recon.scale)};
    for_each_item<kUnroll<Access>>(p.recon_work, Access::kWidth, alone ? 0 : block - p.kl_work.blocks, pass,
                                   [&](int64_t item, double sum) { recon = p.recon_target(item, sum); });
  }
  if (alone || block < p.kl_work.blocks) {
    const LatentPass<Elements<T>, T, T, Prior::standard, false, true, KlOperands<Elements<T>>> pass{
        p.kl, static_cast<T>(p.kl.scale * value_of(p.kl.weight)), 0, 0};
    for_each_item<1>(p.kl_work, 1, block, pass, [&](int64_t item, double sum) { kl = p.kl_target(item, sum); });
  }
  if (alone && threadIdx.x == 0) combine(p.combination, 0, recon, kl);
}

// ---- On the host.

// The KL divergence that goes with the images, if any, and what comes of both.
struct KlPass {
  const LatentArgs* args = nullptr;
  int64_t numel = 0;
  Sums sums;
  Combination combination;
};

template <class Access, class R, class X, class Nll>
cudaError_t launch_objective(const ReconstructionOperands<Access>& operands, int64_t numel, const Sums& sums,
                             const KlPass& kl, const Launch& launch) {
  using T = Arithmetic<R>;
  ObjectiveParams<Access, T> params;
  params.recon = operands;
  params.recon_work = share_out(numel, sums, Access::kWidth, kUnroll<Access>, launch);
  params.recon_target = target_of(params.recon_work, sums, launch.partials);
  bool unfinished = params.recon_target.partials != nullptr;
  if (kl.args != nullptr) {
    params.kl = kl_elements<T>(*kl.args);
    params.kl_work = share_out(kl.numel, kl.sums, 1, 1, launch);
    if (kl.combination.loss != nullptr) {
      unfinished = partials(numel, sums, kl.numel, kl.sums) > 0;
      params.recon_target = {sums, unfinished ? launch.partials : nullptr};
      params.kl_target = {kl.sums, unfinished ? launch.partials + params.recon_work.items : nullptr};
      if (!unfinished) params.combination = kl.combination;
    }
  }
  const bool alone = params.combination.loss != nullptr;
  const int blocks = alone ? 1 : params.recon_work.blocks + params.kl_work.blocks;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = operands.upstream.data == nullptr ? objective_kernel<Access, R, X, Nll, false>
                                                        : objective_kernel<Access, R, X, Nll, true>;
  if (const cudaError_t error = enqueue(kernel, blocks, params, launch); error != cudaSuccess || !unfinished)
    return error;
  return finish(params.recon_work, params.recon_target, params.kl_work, params.kl_target, kl.combination, launch);
}

template <class Access, class R, class X>
cudaError_t launch_objective(const ReconstructionOperands<Access>& operands, const ReconstructionArgs& args,
                             int64_t numel, const Sums& sums, const KlPass& kl, const Launch& launch) {
  switch (args.likelihood) {
    case Likelihood::mse:
      return launch_objective<Access, R, X, SquaredError>(operands, numel, sums, kl, launch);
    case Likelihood::gaussian:
      return launch_objective<Access, R, X, UnitGaussian>(operands, numel, sums, kl, launch);
  }
  return cudaErrorInvalidValue;
}

template <class Access>
void set_scalars(ReconstructionOperands<Access>& o, const ReconstructionArgs& args) {
  o.scale = args.scale;
  o.round_recon_x = args.may_be_kept && args.recon_x.dtype == DType::bfloat16;
  o.round_x = args.may_be_kept && args.x.dtype == DType::bfloat16;
}

template <class T>
cudaError_t objective_elements(const ReconstructionArgs& args, int64_t numel, const Sums& sums, const KlPass& kl,
                               const Launch& launch) {
  ReconstructionOperands<Elements<T>> o;
  o.recon_x = element_operand<T>(args.recon_x);
  o.x = element_operand<T>(args.x);
  o.upstream = element_operand<T>(args.upstream);
  o.value = element_operand<T>(args.value);
  o.d_recon_x = element_operand<T>(args.d_recon_x);
  o.d_x = element_operand<T>(args.d_x);
  set_scalars(o, args);
  return launch_objective<Elements<T>, T, T>(o, args, numel, sums, kl, launch);
}

// Images of dtypes R and X: with 16-byte accesses if the layout lets it, else element by element.
template <class R, class X>
cudaError_t objective_as(const ReconstructionArgs& args, int64_t numel, const Sums& sums, const KlPass& kl,
                         const Launch& launch) {
  constexpr int W = 16 / (sizeof(R) < sizeof(X) ? sizeof(R) : sizeof(X));
  constexpr DType kResult = kDType<Arithmetic<R>>;
  Rows<W> rows(numel, {&args.recon_x, &args.x, &args.upstream, &args.value, &args.d_recon_x, &args.d_x});
  ReconstructionOperands<Vectors<W>> o;
  o.recon_x = rows.operand(args.recon_x, kDType<R>);
  o.x = rows.operand(args.x, kDType<X>);
  o.upstream = rows.operand(args.upstream, kResult, /*may_broadcast=*/true);
  o.value = rows.operand(args.value, kResult);
  o.d_recon_x = rows.operand(args.d_recon_x, kDType<R>);
  o.d_x = rows.operand(args.d_x, kDType<X>);
  rows.sum_over(sums);
  if (!rows.fit()) return objective_elements<Arithmetic<R>>(args, numel, sums, kl, launch);
  o.shape = rows.shape();
  set_scalars(o, args);
  return launch_objective<Vectors<W>, R, X>(o, args, numel, sums, kl, launch);
}

// The instances are spread over several files, to be compiled side by side.
#define FASTVAE_OBJECTIVE(prefix, R, X)                                                                          \
  prefix template cudaError_t objective_as<R, X>(const ReconstructionArgs&, int64_t, const Sums&, const KlPass&, \
                                                 const Launch&);
#define FASTVAE_OBJECTIVE_ELEMENTS(prefix, T)                                                                       \
  prefix template cudaError_t objective_elements<T>(const ReconstructionArgs&, int64_t, const Sums&, const KlPass&, \
                                                    const Launch&);
FASTVAE_OBJECTIVE(extern, double, double)
FASTVAE_OBJECTIVE(extern, float, float)
FASTVAE_OBJECTIVE(extern, float, BFloat16)
FASTVAE_OBJECTIVE(extern, float, Float16)
FASTVAE_OBJECTIVE(extern, BFloat16, float)
FASTVAE_OBJECTIVE(extern, BFloat16, BFloat16)
FASTVAE_OBJECTIVE(extern, BFloat16, Float16)
FASTVAE_OBJECTIVE(extern, Float16, float)
FASTVAE_OBJECTIVE(extern, Float16, BFloat16)
FASTVAE_OBJECTIVE(extern, Float16, Float16)
FASTVAE_OBJECTIVE_ELEMENTS(extern, float)
FASTVAE_OBJECTIVE_ELEMENTS(extern, double)

}  // namespace fastvae::cuda
