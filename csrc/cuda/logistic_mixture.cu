// The mixture of logistics, one thread per pixel. The results of a component are needed again once all components are
// known. They are computed a second time: that is cheaper than memory for them, and the parameters are in the cache.
#include "../formulas/logistic_mixture.h"
#include "fold.cuh"
#include "noise.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
struct Planes {
  typename Elements<T, false>::Operand first;
  int64_t step = 0;

  explicit FASTVAE_DEVICE operator bool() const { return static_cast<bool>(first); }
};

// One pixel of all planes.
template <class T>
class Pixel {
 public:
  FASTVAE_DEVICE Pixel(const Planes<T>& planes, int64_t pixel)
      : planes_(planes), offset_(Elements<T, false>::offset_of(planes.first, pixel)) {}

  FASTVAE_DEVICE T operator[](int channel) const {
    T x;
    with_type<true>(planes_.first.dtype, [&](auto type) {
      x = static_cast<T>(
          widen(static_cast<const decltype(type)*>(planes_.first.data)[offset_ + channel * planes_.step]));
    });
    return x;
  }
  FASTVAE_DEVICE void put(int channel, T x) const {
    with_type(planes_.first.dtype, [&](auto type) {
      narrow(x, static_cast<decltype(type)*>(planes_.first.data)[offset_ + channel * planes_.step]);
    });
  }

 private:
  const Planes<T>& planes_;
  int64_t offset_;
};

template <class T>
struct MixtureParams {
  Mixture mixture;
  Planes<T> in, x, d, d_x, z;
  typename Elements<T, false>::Operand upstream, value, weight;
  Noise noise;
  bool round = false, round_x = false;  // gradients to bfloat16, before the upstream gradient (pass.cuh)
  double scale = 1;
  Number divisor_at;
  Work work;
  Target target;
};

// A pixel's bins of one component.
template <class T>
struct Component {
  LogisticBin<T> bin[3];
  Coefficient<T> by[3];
  T logit, exponent, ratio;
};

template <class T>
FASTVAE_DEVICE Component<T> component(const Mixture& m, const Pixel<T>& in, int k, const Pair<T> (&x)[3],
                                      const T (&edge)[3]) {
  const T half_width = static_cast<T>(m.half_width), least = static_cast<T>(m.least_log_scale);
  Component<T> made;
  made.logit = in[k];
  const auto bin_of = [&](int c, T distant) {
    const T log_scale = in[mean_row(m, c) + m.components + k];
    const Edges<T> edges = edges_of(distant, log_scale, edge[c], half_width, least);
    return logistic_bin(edges, tails_of(edges), log_scale, half_width, least);
  };
  const auto mean = [&](int c) { return in[mean_row(m, c) + k]; };
  made.bin[0] = bin_of(0, distance<0>(x, mean(0), {}, {}));
  made.exponent = made.bin[0].exponent;
  made.ratio = made.bin[0].ratio;
  if (m.channels == 1) return made;
  FASTVAE_UNROLL
  for (int i = 0; i < 3; ++i) made.by[i] = coefficient(in[mean_row(m, i) + 2 * m.components + k]);
  made.bin[1] = bin_of(1, distance<1>(x, mean(1), made.by[0].tanh, {}));
  made.bin[2] = bin_of(2, distance<2>(x, mean(2), made.by[1].tanh, made.by[2].tanh));
  FASTVAE_UNROLL
  for (int c = 1; c < 3; ++c) {
    made.exponent = made.exponent + made.bin[c].exponent;
    made.ratio = made.ratio * made.bin[c].ratio;
  }
  return made;
}

// A sum of terms ratio * e^exponent, divided by the largest power of e so far.
template <class T>
struct OnlineSum {
  T most = Constants<T>::kLowest, sum = 0;

  FASTVAE_DEVICE void add(T exponent, T ratio) {
    const T larger = at_least(exponent, most);
    sum = multiply_add(sum, exponential_of_negative(most - larger), ratio * exponential_of_negative(exponent - larger));
    most = larger;
  }
};

template <class T>
struct MixturePass {
  const MixtureParams<T>& p;
  T scale;

  template <int n>
  FASTVAE_DEVICE T packs(int64_t pixel, int64_t) const {
    return single(pixel);
  }

  FASTVAE_DEVICE T single(int64_t pixel) const {
    using Access = Elements<T, false>;
    const Mixture& m = p.mixture;
    const int K = m.components;
    const Pixel<T> in(p.in, pixel), given(p.x, pixel);
    Pair<T> x[3] = {};
    T edge[3] = {};
    FASTVAE_UNROLL
    for (int c = 0; c < 3; ++c) {
      if (c >= m.channels) continue;
      x[c] = scaled(m, given[c]);
      edge[c] = edge_of(x[c].high, static_cast<T>(m.low), static_cast<T>(m.high));
    }
    OnlineSum<T> prior, joint;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      const Component<T> made = component(m, in, k, x, edge);
      prior.add(made.logit, T(1));
      joint.add(made.logit - made.exponent, made.ratio);
    }
    T value = (prior.most - joint.most) + (logarithm(prior.sum) - logarithm(joint.sum));
    T weight(1), upstream(1);
    if (p.weight) weight = Access::template load<>(p.weight, {pixel}).x;
    if (p.upstream) upstream = Access::template load<>(p.upstream, {pixel}).x;
    const bool absent = p.weight && weight == T(0);
    value = absent ? T(0) : weight * value;
    if (p.value) {
      const T one[1] = {value};
      Access::store(p.value, {pixel}, one);
    }
    if (!p.d && !p.d_x) return value;

    const auto factor = [&](T derivative, bool round) {
      if (p.weight) derivative = absent ? T(0) : weight * derivative;
      T g = scale * derivative;
      if (!p.upstream) return g;
      if (round) g = rounded<BFloat16>(g);
      return g * upstream;
    };
    const T by_prior = quotient(T(1), prior.sum), by_joint = quotient(T(1), joint.sum);
    T g_x[3] = {};
    const Pixel<T> d(p.d, pixel), d_x(p.d_x, pixel);
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      const Component<T> made = component(m, in, k, x, edge);
      const T w = made.ratio * exponential_of_negative((made.logit - made.exponent) - joint.most) * by_joint;
      const auto put = [&](int row, T derivative) {
        if (p.d) d.put(row, factor(derivative, p.round));
      };
      put(k, exponential_of_negative(made.logit - prior.most) * by_prior - w);
      T g[3] = {};
      FASTVAE_UNROLL
      for (int c = 0; c < 3; ++c) {
        if (c >= m.channels) continue;
        g[c] = w * made.bin[c].by_distance;
        put(mean_row(m, c) + k, g[c]);
        put(mean_row(m, c) + K + k, -(w * made.bin[c].by_log_scale));
        g_x[c] = g_x[c] - g[c];
      }
      if (m.channels == 1) continue;
      FASTVAE_UNROLL
      for (int i = 0; i < 3; ++i) {
        const int to = i == 0 ? 1 : 2, of = i == 2 ? 1 : 0;
        put(mean_row(m, i) + 2 * K + k, g[to] * x[of].high * made.by[i].slope);
        g_x[of] = multiply_add(made.by[i].tanh.high, g[to], g_x[of]);
      }
    }
    FASTVAE_UNROLL
    for (int c = 0; c < 3; ++c) {
      if (p.d_x && c < m.channels) d_x.put(c, factor(g_x[c] * static_cast<T>(m.scale), p.round_x));
    }
    return value;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    mixture_kernel(const __grid_constant__ MixtureParams<T> p) {
  const MixturePass<T> pass{p, static_cast<T>(p.scale / value_of(p.divisor_at))};
  do_work<1>(p.work, 1, blockIdx.x, pass, [&](int64_t item, double sum) { p.target(item, sum); });
}

template <class T>
__global__ void __launch_bounds__(kThreads) draw_mixture_kernel(const __grid_constant__ MixtureParams<T> p) {
  const uint64_t seed = seed_of(p.noise), offset = offset_of(p.noise);
  keep(p.noise, seed, offset);
  const int each = p.mixture.components + p.mixture.channels;
  for (int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x; pixel < p.work.row;
       pixel += int64_t(gridDim.x) * kThreads) {
    const Pixel<T> in(p.in, pixel), z(p.z, pixel);
    draw_pixel<T>(
        p.mixture, [&](int row) { return in[row]; }, RandomWords<T>(seed, offset, static_cast<uint64_t>(pixel) * each),
        [&](int c, T x) { z.put(c, x); });
  }
}

// A block takes kThreads pixels at a time. A pixel is much work, so even a few pixels are divided among blocks.
Work work_of(const MixtureArgs& args, int64_t most) {
  Work work;
  work.row = args.sums.event > 0 ? args.sums.event : args.numel;
  work.chunk = kThreads;
  const int64_t chunks = ceil_div(work.row, kThreads);
  if (args.sums.event > 0) work.chunks = chunks;
  work.items = args.sums.event > 0 ? args.sums.count * chunks : std::min({chunks, most, int64_t(kMostBlocks)});
  work.blocks = static_cast<int>(std::min({work.items, most, int64_t(kMostBlocks)}));
  return work;
}

template <class T>
cudaError_t launch_mixture(const MixtureArgs& args, const Launch& launch) {
  MixtureParams<T> params;
  params.mixture = args.mixture;
  const auto planes = [](const View& view, int64_t step, Planes<T>& to) {
    static_cast<View&>(to.first) = view;
    to.step = step;
  };
  planes(args.in[0], args.step[0], params.in);
  planes(args.in[1], args.step[1], params.x);
  planes(args.d[0], args.d_step[0], params.d);
  planes(args.d[1], args.d_step[1], params.d_x);
  planes(args.z, args.z_step, params.z);
  static_cast<View&>(params.upstream) = args.upstream;
  static_cast<View&>(params.value) = args.value;
  static_cast<View&>(params.weight) = args.weight;
  params.noise = args.noise;
  params.round = args.d[0].dtype == DType::bfloat16;
  params.round_x = args.d[1].dtype == DType::bfloat16;
  params.scale = args.scale;
  params.divisor_at = args.sums.divisor_at;
  if (args.z.data != nullptr) {
    params.work.row = args.numel;
    return start<draw_mixture_kernel<T>>(ceil_div(args.numel, kThreads), params, launch);
  }
  constexpr auto kKernel = mixture_kernel<T>;
  Part part[2];
  params.work = part[0].work = work_of(args, resident_blocks<kKernel>(launch.device));
  part[0].target.sums = args.sums;
  if (args.sums.data != nullptr && !params.work.is_whole()) part[0].target.partials = launch.partials;
  params.target = part[0].target;
  if (const cudaError_t error = enqueue<MixtureParams<T>>(kKernel, params.work.blocks, params, launch)) return error;
  return part[0].is_finished() ? cudaSuccess : finish(part, {}, launch);
}

}  // namespace

int64_t partials(const MixtureArgs& args) { return args.sums.data == nullptr ? 0 : work_of(args, kMostBlocks).items; }

cudaError_t logistic_mixture(const MixtureArgs& args, const Launch& launch) {
  if (args.numel == 0) return cudaSuccess;
  return args.float64 ? launch_mixture<double>(args, launch) : launch_mixture<float>(args, launch);
}

}  // namespace fastvae::cuda
