// The pass over the elements of tensors, for any formula: the value, the gradients, a sample, or several of them. Each
// input is read once and each result is written once. Noise is drawn in registers, and a second time in the backward
// pass. Memory limits the speed of a pass without noise; memory and instructions limit a pass with noise.
#pragma once

#include "../formulas/element.h"
#include "../formulas/kl.h"
#include "../formulas/sample.h"
#include "fold.cuh"
#include "noise.cuh"

namespace fastvae::cuda {

// The backward pass makes gradients from the gradient of the result or of the sample. either: chosen at run time.
enum class Direction { forward, backward, either };

template <class Access, bool kSample>
struct SampleOperands {};
template <class Access>
struct SampleOperands<Access, true> {
  typename Access::Operand z, dz, eps, d_eps;
  Noise noise;
};

template <class Access, int n, bool kSample>
struct Operands : SampleOperands<Access, kSample> {
  typename Access::Operand in[n], d[n], upstream, value, weight;
  typename Access::Shape shape;
  bool backward;
  // Bit i of `round`: input i's gradient is rounded to bfloat16 before it is multiplied by the upstream gradient, as if
  // made in the forward pass. Bit i of `later`: it is folded, and finish_fold multiplies the sum by the upstream one.
  uint32_t round = 0, later = 0;
  double scale;
  Number scale_at, divisor_at;
  Extras<typename Access::Type> extras;
};

// What a thread computes before its first element.
template <class T>
struct Found {
  T scale;
  uint64_t seed = 0, offset = 0;  // of the noise
};
template <class Access, int n, bool kSample>
FASTVAE_DEVICE Found<typename Access::Type> find(const Operands<Access, n, kSample>& o) {
  using T = typename Access::Type;
  Found<T> found{static_cast<T>(o.scale * value_of(o.scale_at) / value_of(o.divisor_at))};
  if constexpr (kSample) {
    found.seed = seed_of(o.noise);
    found.offset = offset_of(o.noise);
    keep(o.noise, found.seed, found.offset);
  }
  return found;
}

// Turns derivatives into gradients, as Gradient in cpu/blocks.h does.
template <class T, int W>
FASTVAE_DEVICE void to_gradient(T (&d)[W], T scale, bool has_upstream, const T (&upstream)[W], bool round) {
  FASTVAE_UNROLL
  for (int j = 0; j < W; ++j) d[j] = scale * d[j];
  if (!has_upstream) return;
  if (round) {
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) d[j] = rounded<BFloat16>(d[j]);
  }
  FASTVAE_UNROLL
  for (int j = 0; j < W; ++j) d[j] = d[j] * upstream[j];
}

// Returns the sum of kCount packs' values. The first pack begins at `element`. kExtras: with those of element.h.
template <int kCount, class F, class Access, Direction kDirection, bool kSample, bool kExtras, class Operands>
FASTVAE_DEVICE auto pass_packs(const Operands& o, const Found<typename Access::Type>& found,
                               const typename Access::Place (&at)[kCount], int64_t element) {
  using T = typename Access::Type;
  constexpr int W = Access::kWidth, n = kInputsOf<F>;
  constexpr bool kLoss = !std::is_same_v<F, NoLoss>;
  constexpr bool kEither = kDirection == Direction::either;
  const bool backward = kEither ? o.backward : kDirection == Direction::backward;
  const bool has_upstream = backward && kLoss && ((!kEither && !kSample) || o.upstream);
  // All loads are issued before the first loaded value is used.
  typename Access::Loaded in_loaded[kCount][n], dz_loaded[kCount], upstream_loaded[kCount], weight_loaded[kCount];
  FASTVAE_UNROLL
  for (int u = 0; u < kCount; ++u) {
    FASTVAE_UNROLL
    for (int i = 0; i < n; ++i) {
      if (kHasData<F> && i == 1) {
        in_loaded[u][i] = Access::template load<true>(o.in[i], at[u]);
      } else if (kLoss || i == 1 || !backward) {
        in_loaded[u][i] = Access::load(o.in[i], at[u]);
      }
    }
    if constexpr (kSample) {
      if (backward) dz_loaded[u] = Access::load(o.dz, at[u]);
    }
    if constexpr (kLoss) {
      if (has_upstream) upstream_loaded[u] = Access::template load<false, true>(o.upstream, at[u]);
    }
    if constexpr (kExtras && !kSample) {
      if (o.weight) weight_loaded[u] = Access::template load<true>(o.weight, at[u]);
    }
  }
  T sum = 0;
  FASTVAE_UNROLL
  for (int u = 0; u < kCount; ++u) {
    T in[n][W], upstream[W], weight[W], value[W], d[n][W], dz[W], eps[W], z[W], d_logvar[W], d_eps[W];
    if constexpr (kSample) {
      if (o.eps) {
        Access::unpack(o.eps, Access::load(o.eps, at[u]), eps);
      } else {
        draw_pack(found.seed, found.offset, element, eps);
      }
      if (backward) Access::unpack(o.dz, dz_loaded[u], dz);
    }
    FASTVAE_UNROLL
    for (int i = 0; i < n; ++i) {
      if (kLoss || i == 1 || !backward) Access::unpack(o.in[i], in_loaded[u][i], in[i]);
    }
    if constexpr (kLoss) {
      if (has_upstream) Access::unpack(o.upstream, upstream_loaded[u], upstream);
    }
    if constexpr (kExtras && !kSample) {
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) weight[j] = 1;
      if (o.weight) Access::unpack(o.weight, weight_loaded[u], weight);
    }
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) {
      T x[n], sigma = 0, variance = 0;
      FASTVAE_UNROLL
      for (int i = 0; i < n; ++i) x[i] = in[i][j];
      if constexpr (kSample) {
        T d_sigma;
        if constexpr (kExtras) {
          const Spread<T> spread = o.extras.spread(x[1], true);
          sigma = spread.sigma;
          d_sigma = spread.d_sigma;
        } else {
          sigma = standard_deviation(x[1]);
          d_sigma = T(0.5) * sigma;
        }
        variance = sigma * sigma;
        if (backward) {
          d_logvar[j] = dz[j] * (d_sigma * eps[j]);
          d_eps[j] = dz[j] * sigma;
        } else {
          z[j] = sample(x[0], sigma, eps[j]);
        }
      }
      Terms<T, n> terms{};
      if constexpr (kLoss && kExtras) {
        terms = fastvae::element<F>(x, o.extras, kSample ? nullptr : &weight[j], kSample ? &variance : nullptr);
      } else if constexpr (kLoss) {
        terms = fastvae::at<F>(x, o.extras.number, kSample ? &variance : nullptr);
      }
      value[j] = terms.value;
      FASTVAE_UNROLL
      for (int i = 0; i < n; ++i) d[i][j] = terms.d[i];
    }
    if constexpr (kSample) {
      if (!backward) Access::store(o.z, at[u], z);
    }
    if constexpr (kLoss) {
      if (!backward) {
        sum += pack_sum(value);
        if (o.value) Access::store(o.value, at[u], value);
      }
    }
    // One gradient after the other: all at once would need too many registers.
    FASTVAE_UNROLL
    for (int i = 0; i < n; ++i) {
      if ((kSample && !backward) || !o.d[i]) continue;
      if constexpr (kLoss) {
        to_gradient(d[i], found.scale, has_upstream && !(o.later >> i & 1), upstream, o.round >> i & 1);
      }
      if constexpr (kSample) {
        FASTVAE_UNROLL
        for (int j = 0; j < W && i < 2; ++j) d[i][j] = (i == 0 ? dz[j] : d_logvar[j]) + d[i][j];
      }
      Access::store(o.d[i], at[u], d[i]);
    }
    if constexpr (kSample) {
      if (backward && o.d_eps) Access::store(o.d_eps, at[u], d_eps);
    }
  }
  return sum;
}

template <class F, class Access, Direction kDirection, bool kSample, bool kExtras, class Operands>
struct Pass {
  using T = typename Access::Type;
  const Operands& operands;
  const Found<T>& found;

  template <int kCount>
  FASTVAE_DEVICE T packs(int64_t first, int distance) const {
    typename Access::Place at[kCount];
    FASTVAE_UNROLL
    for (int u = 0; u < kCount; ++u) at[u] = Access::place(operands.shape, first + u * distance);
    return pass_packs<kCount, F, Access, kDirection, kSample, kExtras>(operands, found, at, first * Access::kWidth);
  }
  FASTVAE_DEVICE T single(int64_t element) const {
    return Pass<F, typename Access::Singles, kDirection, kSample, kExtras, Operands>{operands, found}.template packs<1>(
        element, 1);
  }
  FASTVAE_DEVICE T at(int64_t element, int in_tile) const {
    const typename Access::Place at[1] = {{element, in_tile}};
    return pass_packs<1, F, Access, kDirection, kSample, kExtras>(operands, found, at, element);
  }
};

// Sampling takes many registers, so with extras it goes element by element.
template <class Access, bool kSample>
constexpr bool kExtrasOf =
    kSample ? Access::kWidth == 1 : !(std::is_same_v<Access, Rows<float, 4, true>> || Access::kWidth == 8);

// The latents' KL in the kernel of a likelihood.
template <class T, bool kPresent>
struct Beside {};
template <class T>
struct Beside<T, true> {
  Operands<Elements<T, false>, kInputsOf<KlStandard>, false> kl;
  Work kl_work;
  Target kl_target;
  Combination combination;  // has a loss only if one block does all work
};

template <class F, class Access, bool kSample>
struct PassParams : Beside<typename Access::Type, kHasData<F>> {
  Operands<Access, kInputsOf<F>, kSample> main;
  Work work;
  Target target;
};

// For __launch_bounds__: the blocks that a multiprocessor runs at once, as many as possible without spilling registers.
template <class F, class Access, Direction kDirection, bool kSample>
constexpr int fewest_blocks() {
  constexpr bool kShort = kInputsOf<F> == 2, kForward = kDirection == Direction::forward;
  if (sizeof(typename Access::Type) == 8) return kSample ? (kShort ? 2 : 1) : (kLogvars<F> == 0 ? 2 : 1);
  if (Access::kWidth == 1) return kSample && !kShort ? 3 : 4;
  if (F::kSparse) return 2;  // one kernel computes both of its parts
  if (Access::kWidth == 8) return (kShort || !kSample ? 3 : 2) - (kForward || (kShort && !kSample) ? 0 : 1);
  if (std::is_same_v<Access, Rows<float, 4, true>>) return kShort ? 4 : kSample ? 2 : 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
  return kSample ? (kShort ? 2 : 1) : 3;  // with 2 blocks, a sample and the KL to a prior would spill
#else
  return kSample ? 2 : 3;
#endif
}

// Packs that a thread loads at a time.
template <class F, class Access, bool kSample>
constexpr int kUnroll = kHasData<F> && std::is_same_v<Access, Rows<float, 4, true>> ? 2 : 1;

template <class F, class Access, Direction kDirection, bool kSample>
__global__ void __launch_bounds__(kThreads, fewest_blocks<F, Access, kDirection, kSample>())
    pass_kernel(const __grid_constant__ PassParams<F, Access, kSample> p) {
  using T = typename Access::Type;
  const int block = static_cast<int>(blockIdx.x);
  int before = 0;  // blocks for the KL
  bool alone = false;
  if constexpr (kHasData<F>) {
    before = p.kl_work.blocks;
    alone = p.combination.loss != nullptr;  // one block for both
  }
  [[maybe_unused]] double main = 0, kl = 0;
  if (alone || block >= before) {
    const auto found = find(p.main);
    const Pass<F, Access, kDirection, kSample, kExtrasOf<Access, kSample>, decltype(p.main)> pass{p.main, found};
    do_work<kUnroll<F, Access, kSample>>(p.work, Access::kWidth, alone ? 0 : block - before, pass,
                                         [&](int64_t item, double sum) { main = p.target(item, sum); });
  }
  if constexpr (kHasData<F>) {
    if (alone || block < before) {
      using Latents = Elements<T, false>;
      const auto found = find(p.kl);
      const Pass<KlStandard, Latents, kDirection, false, true, decltype(p.kl)> pass{p.kl, found};
      do_work<1>(p.kl_work, 1, block, pass, [&](int64_t item, double sum) { kl = p.kl_target(item, sum); });
    }
    if (alone && threadIdx.x == 0) combine(p.combination, 0, main, kl);
  }
}

template <class F, class T, bool kSample>
struct FoldParams {
  Operands<Elements<T, true>, kInputsOf<F>, kSample> main;
  Folding fold;
  double* partials;
};

template <class F, class T, bool kSample>
__global__ void __launch_bounds__(kThreads, 2) fold_kernel(const __grid_constant__ FoldParams<F, T, kSample> p) {
  using Access = Elements<T, true>;
  const auto found = find(p.main);
  const double sum = fold_slab<Access>(
      p.fold, p.partials, Pass<F, Access, Direction::either, kSample, true, decltype(p.main)>{p.main, found});
  if (threadIdx.x == 0) p.partials[p.fold.partials() + blockIdx.x] = sum;
}

// ---- On the host.

inline bool is_backward(const PassArgs& args) { return args.upstream.data != nullptr || args.dz.data != nullptr; }
inline bool is_sample(const PassArgs& args) { return args.z.data != nullptr || args.dz.data != nullptr; }

// Operands from the arguments; `make` makes one from a view.
template <class Access, int n, bool kSample, class Make>
Operands<Access, n, kSample> operands_of(const PassArgs& args, const RowShape& shape, Make make) {
  Operands<Access, n, kSample> o;
  for (int i = 0; i < n; ++i) {
    o.in[i] = make(args.in[i]);
    o.d[i] = make(args.d[i]);
    const bool folded = folded_size(args.d[i]) > 0;
    if (args.may_be_kept && args.d[i].dtype == DType::bfloat16 && !folded) o.round |= 1u << i;
    if (args.may_be_kept && folded) o.later |= 1u << i;
  }
  o.upstream = make(args.upstream);
  o.value = make(args.value);
  o.weight = make(args.weight);
  if constexpr (std::is_same_v<typename Access::Shape, RowShape>) o.shape = shape;
  o.backward = is_backward(args);
  o.scale = args.scale;
  o.scale_at = args.scale_at;
  o.divisor_at = args.sums.divisor_at;
  o.extras = Extras<typename Access::Type>(args);
  if constexpr (kSample) {
    o.z = make(args.z);
    o.dz = make(args.dz);
    o.eps = make(args.eps);
    o.d_eps = make(args.d_eps);
    o.noise = args.noise;
  }
  return o;
}

template <class T, int n, bool kSample, bool kFolds = false>
Operands<Elements<T, kFolds>, n, kSample> element_operands(const PassArgs& args) {
  return operands_of<Elements<T, kFolds>, n, kSample>(args, {}, [&](const View& view) {
    typename Elements<T, kFolds>::Operand operand;
    static_cast<View&>(operand) = view;
    return operand;
  });
}

template <class F, class T, bool kSample>
cudaError_t launch_fold(const PassArgs& args, Part& part, const Launch& launch) {
  FoldParams<F, T, kSample> params{element_operands<T, kInputsOf<F>, kSample, true>(args), part.fold, part.partials};
  for (int r = 0; r < part.fold.count; ++r)
    if (part.fold.result[r].numel > INT32_MAX) return cudaErrorInvalidValue;
  int folds = 0;  // as folding_of() numbers them
  for (auto& d : params.main.d) d.fold = folded_size(d) > 0 ? folds++ : -1;
  if (folded_size(params.main.value) > 0) params.main.value.fold = folds;
  part.work.items = part.fold.slabs;
  if (args.sums.data != nullptr) part.target.partials = part.partials + part.fold.partials();
  return enqueue(fold_kernel<F, T, kSample>, part.fold.slabs, params, launch);
}

template <class F, Direction kDirection, class Access, int n, bool kSample>
cudaError_t launch(const Operands<Access, n, kSample>& operands, const PassArgs& args, const PassArgs* kl,
                   const Combination& combination, Part (&part)[2], const Launch& launch) {
  constexpr auto kKernel = pass_kernel<F, Access, kDirection, kSample>;
  const int64_t most = resident_blocks<kKernel>(launch.device);
  const bool alone = is_alone(args.numel, args.sums) &&
                     (kl == nullptr || (combination.loss != nullptr && is_alone(kl->numel, kl->sums)));
  // If sums are combined to a loss, finish() adds all of them up, unless one block does all work.
  const auto target_of = [&](Part& of) {
    const bool whole = combination.loss == nullptr ? of.work.is_whole() : alone;
    if (!whole && of.target.sums.data != nullptr) of.target.partials = of.partials;
    return of.target;
  };
  PassParams<F, Access, kSample> params;
  params.main = operands;
  params.work = part[0].work =
      share_out(args.numel, args.sums, Access::kWidth, kUnroll<F, Access, kSample>, most, alone);
  params.target = target_of(part[0]);
  int blocks = params.work.blocks;
  if constexpr (kHasData<F>) {
    if (kl != nullptr) {
      using T = typename Access::Type;
      params.kl = element_operands<T, kInputsOf<KlStandard>, false>(*kl);
      params.kl_work = part[1].work = share_out(kl->numel, kl->sums, 1, 1, most, alone);
      params.kl_target = target_of(part[1]);
      if (alone) params.combination = combination;
      blocks = alone ? 1 : blocks + params.kl_work.blocks;
    }
  }
  return blocks == 0 ? cudaSuccess : enqueue<PassParams<F, Access, kSample>>(kKernel, blocks, params, launch);
}

template <class F, class T, bool kSample>
cudaError_t run_as(const PassArgs& args, const PassArgs* kl, const Combination& combination, Part (&part)[2],
                   const Launch& to) {
  constexpr int n = kInputsOf<F>;
  constexpr auto forward = Direction::forward, backward = Direction::backward, either = Direction::either;
  const bool extras = args.has_extras();
  if (part[0].fold.slabs > 0) return launch_fold<F, T, kSample>(args, part[0], to);
  RowFit rows(args.numel, args.sums.event, kDType<T>);
  for (const View& view : args.in) rows.add(view);
  for (const View& view : args.d) rows.add(view);
  for (const View* view : {&args.value, &args.weight, &args.z, &args.dz, &args.eps, &args.d_eps}) rows.add(*view);
  rows.add(args.upstream, true);
  // Launches the kernel with packs of this width and kind, if they fit.
  cudaError_t result = cudaSuccess;
  const auto try_rows = [&](auto access, auto both_ways) {
    using Access = decltype(access);
    bool fits = rows.fits(Access::kWidth);
    if (!fits) return false;
    const auto o = operands_of<Access, n, kSample>(
        args, rows.shape(), [&](const View& view) { return rows.operand(view, Access::kWidth, fits); });
    if (!fits) return false;
    if constexpr (decltype(both_ways)::value) {
      result = launch<F, either>(o, args, kl, combination, part, to);
    } else {
      result = o.backward ? launch<F, backward>(o, args, kl, combination, part, to)
                          : launch<F, forward>(o, args, kl, combination, part, to);
    }
    return true;
  };
  if (kSample && extras)
    return launch<F, either>(element_operands<T, n, kSample>(args), args, kl, combination, part, to);
  if constexpr (sizeof(T) == 4) {
    if constexpr (F::kLight) {
      if (!extras && rows.is_plain() && try_rows(Rows<T, 4, true>(), std::false_type())) return result;
      if (!extras && rows.has_narrow() && try_rows(Rows<T, 8, false>(), std::false_type())) return result;
    }
    if (try_rows(Rows<T, 4, false>(), std::bool_constant<kSample>())) return result;
  } else {
    if (try_rows(Rows<T, 2, false>(), std::true_type())) return result;
  }
  return launch<F, either>(element_operands<T, n, kSample>(args), args, kl, combination, part, to);
}

template <class F>
cudaError_t run(const PassArgs& args, const PassArgs* kl, const Combination& combination, Part (&part)[2],
                const Launch& launch) {
  if constexpr (kIsPosterior<F>) {
    if (is_sample(args)) {
      return args.float64 ? run_as<F, double, true>(args, kl, combination, part, launch)
                          : run_as<F, float, true>(args, kl, combination, part, launch);
    }
  }
  if constexpr (std::is_same_v<F, NoLoss>) {
    return args.numel == 0 ? cudaSuccess : cudaErrorInvalidValue;  // no result is wanted
  } else {
    return args.float64 ? run_as<F, double, false>(args, kl, combination, part, launch)
                        : run_as<F, float, false>(args, kl, combination, part, launch);
  }
}

}  // namespace fastvae::cuda

// The instances for a formula, in a file that setup.py writes.
#define FASTVAE_INSTANCES(F)                                                                                     \
  namespace fastvae::cuda {                                                                                      \
  template cudaError_t run<F>(const PassArgs&, const PassArgs*, const Combination&, Part (&)[2], const Launch&); \
  }
