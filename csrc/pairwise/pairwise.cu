// The pairs on a GPU. Forward, a warp takes a row, and its lanes take the components. Backward, a block takes a few
// rows and goes through the components in chunks: first a thread per pair computes the pair's share of the mixture,
// then a thread per row and dimension adds up. For the components' gradients, a second kernel does the same with rows
// and components exchanged. So no two blocks add to the same place, but the pairs are computed twice.
#include "../cuda/reduce.cuh"
#include "pair.h"
#include "pairwise.h"

namespace fastvae::cuda {
namespace {

constexpr int kOwn = kThreads / kWarp;  // rows (or components) of a block in the backward pass
constexpr int kChunk = kWarp;           // components (or rows) that it takes at a time

template <class T>
constexpr T kTooSmall = sizeof(T) == 4 ? T(1e-28) : T(1e-280);  // as on the CPU

template <class T>
struct PairwiseParams {
  PairwiseArgs args;
  double* terms;                        // [3, B] of the decomposition
  T *scale, *constant, *joint, *bound;  // [K, L], [K, L], [K], [L]
  T* base;                              // [B] what is subtracted from a row's log-weights
  T *g, *own, *from_z, *h;              // [B], [B], [B], [B, L]: upstream gradients, divided by the sums

  FASTVAE_DEVICE int64_t at(int64_t row, int64_t d) const { return row * args.dims + d; }
  FASTVAE_DEVICE T z(int64_t i, int64_t d) const { return static_cast<const T*>(args.z)[at(i, d)]; }
  FASTVAE_DEVICE T distance(T z, int64_t j, int64_t d) const {
    return scaled_distance(z, static_cast<const T*>(args.mu)[at(j, d)], scale[at(j, d)]);
  }
  FASTVAE_DEVICE T given_weight(int64_t i, int64_t j) const {
    return static_cast<const T*>(args.log_weight)[i * args.components + j];
  }
  // The log-weight, minus the base and minus what the constants include.
  FASTVAE_DEVICE T weight(int64_t i, int64_t j) const {
    if (args.weight_by_row) return given_weight(i, j) - base[i];
    return args.log_weight == nullptr && i == j ? static_cast<T>(args.own - args.other) : T(0);
  }
  FASTVAE_DEVICE T squares(int64_t i, int64_t j) const {
    T sum(0);
    for (int64_t d = 0; d < args.dims; ++d) {
      const T u = distance(z(i, d), j, d);
      sum = multiply_add(u, u, sum);
    }
    return sum;
  }
  FASTVAE_DEVICE T joint_exponent(int64_t i, int64_t j, T squares) const { return (joint[j] + weight(i, j)) - squares; }
  FASTVAE_DEVICE T marginal_exponent(int64_t i, int64_t j, int64_t d, T u) const {
    return log_density(u, constant[at(j, d)]) + weight(i, j);
  }
  // What the forward pass keeps: the reference and the sum of the mixture, then those of each dimension.
  FASTVAE_DEVICE T* stats(int64_t i) const { return static_cast<T*>(args.stats) + i * args.stats_of_a_row(); }
};

FASTVAE_DEVICE double warp_max(double x) {
  FASTVAE_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, x, step);
    x = at_least(x, other);
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) pack_kernel(const __grid_constant__ PairwiseParams<T> p) {
  const PairwiseArgs& args = p.args;
  const T* shared = args.weight_by_row ? nullptr : static_cast<const T*>(args.log_weight);
  for_each_by_warp(args.components, [&](int64_t j, int lane) {
    double joint = 0;
    for (int64_t d = lane; d < args.dims; d += kWarp) {
      const Component<T> c = component(static_cast<const T*>(args.logvar)[p.at(j, d)]);
      p.scale[p.at(j, d)] = c.scale;
      p.constant[p.at(j, d)] = shared == nullptr ? c.constant : c.constant + shared[j];
      joint += static_cast<double>(c.constant);
    }
    joint = warp_sum(joint);
    if (lane == 0) p.joint[j] = static_cast<T>(shared == nullptr ? joint : joint + static_cast<double>(shared[j]));
  });
  for_each_by_warp(args.rows, [&](int64_t i, int lane) {
    double largest = Constants<T>::kLowest;
    for (int64_t j = lane; j < args.components && args.weight_by_row; j += kWarp)
      largest = at_least(largest, static_cast<double>(p.given_weight(i, j)));
    largest = warp_max(largest);
    if (lane == 0)
      p.base[i] = static_cast<T>(args.weight_by_row ? largest : args.log_weight == nullptr ? args.other : 0);
  });
}

// Subtracts the largest constant of each dimension.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) bound_kernel(const __grid_constant__ PairwiseParams<T> p) {
  for_each_by_warp(p.args.dims, [&](int64_t d, int lane) {
    double largest = Constants<T>::kLowest;
    for (int64_t j = lane; j < p.args.components; j += kWarp)
      largest = at_least(largest, static_cast<double>(p.constant[p.at(j, d)]));
    const T bound = static_cast<T>(warp_max(largest));
    if (lane == 0) p.bound[d] = bound;
    for (int64_t j = lane; j < p.args.components; j += kWarp) p.constant[p.at(j, d)] -= bound;
  });
}

// Returns log q_i, and keeps what the backward pass needs.
template <class T>
FASTVAE_DEVICE double mixture(const PairwiseParams<T>& p, int64_t i, int lane) {
  Compensated<T> sum{T(0), T(0)};
  T most = Constants<T>::kLowest;
  for (int64_t j = lane; j < p.args.components; j += kWarp) {
    const T x = p.joint_exponent(i, j, p.squares(i, j)), largest = at_least(most, x);
    sum.scale(exponential_of_log_weight(most - largest));
    sum.add(exponential_of_log_weight(x - largest));
    most = largest;
  }
  const T reference = static_cast<T>(warp_max(static_cast<double>(most)));
  const T total =
      static_cast<T>(warp_sum(static_cast<double>(sum.total() * exponential_of_log_weight(most - reference))));
  if (lane == 0) {
    p.stats(i)[0] = reference;
    p.stats(i)[1] = total;
  }
  return static_cast<double>(reference) + static_cast<double>(p.base[i]) + static_cast<double>(logarithm(total));
}

template <class T>
FASTVAE_DEVICE T marginal_sum(const PairwiseParams<T>& p, int64_t i, int64_t d, int lane, T shift) {
  Compensated<T> sum{T(0), T(0)};
  const T z = p.z(i, d);
  for (int64_t j = lane; j < p.args.components; j += kWarp)
    sum.add(exponential_of_log_weight(p.marginal_exponent(i, j, d, p.distance(z, j, d)) - shift));
  return static_cast<T>(warp_sum(static_cast<double>(sum.total())));
}

template <class T>
FASTVAE_DEVICE double marginal(const PairwiseParams<T>& p, int64_t i, int64_t d, int lane) {
  T shift(0), sum = marginal_sum(p, i, d, lane, shift);
  if (sum < kTooSmall<T>) {  // far from all components
    double most = Constants<T>::kLowest;
    for (int64_t j = lane; j < p.args.components; j += kWarp)
      most = at_least(most, static_cast<double>(p.marginal_exponent(i, j, d, p.distance(p.z(i, d), j, d))));
    shift = static_cast<T>(warp_max(most));
    sum = marginal_sum(p, i, d, lane, shift);
  }
  if (lane == 0) {
    p.stats(i)[2 + 2 * d] = shift;
    p.stats(i)[3 + 2 * d] = sum;
  }
  return static_cast<double>(p.bound[d]) + static_cast<double>(shift) + static_cast<double>(p.base[i]) +
         static_cast<double>(logarithm(sum));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ PairwiseParams<T> p) {
  const PairwiseArgs& args = p.args;
  for_each_by_warp(args.rows, [&](int64_t i, int lane) {
    const double log_q = args.joint ? mixture(p, i, lane) : 0;
    if (lane == 0 && args.log_q != nullptr) static_cast<T*>(args.log_q)[i] = static_cast<T>(log_q);
    double log_prod = 0, log_p = 0;
    for (int64_t d = 0; d < args.dims && args.marginals; ++d) {
      const double log_q_d = marginal(p, i, d, lane), z = static_cast<double>(p.z(i, d));
      log_prod += log_q_d;
      log_p -= 0.91893853320467274178 + 0.5 * z * z;
      if (lane == 0 && args.log_q_dims != nullptr)
        static_cast<T*>(args.log_q_dims)[p.at(i, d)] = static_cast<T>(log_q_d);
    }
    if (lane == 0 && args.decompose) {
      p.terms[i] = static_cast<double>(p.joint[i] - p.squares(i, i)) - log_q;
      p.terms[args.rows + i] = log_q - log_prod;
      p.terms[2 * args.rows + i] = log_prod - log_p;
    }
  });
}

// The terms of all rows, each summed by a warp.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) terms_kernel(const __grid_constant__ PairwiseParams<T> p) {
  for_each_by_warp(3, [&](int64_t k, int lane) {
    T* to = static_cast<T*>(p.args.terms[k]);
    double sum = 0;
    for (int64_t i = lane; i < p.args.rows; i += kWarp) {
      const double term = p.terms[k * p.args.rows + i];
      sum += term;
      if (p.args.by_row) to[i] = static_cast<T>(term);
    }
    sum = warp_sum(sum);
    if (lane == 0 && !p.args.by_row) to[0] = static_cast<T>(sum / p.args.divisor);
  });
}

// Upstream gradients, divided by the sums.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) upstream_kernel(const __grid_constant__ PairwiseParams<T> p) {
  const PairwiseArgs& args = p.args;
  for_each_by_warp(args.rows, [&](int64_t i, int lane) {
    const auto given = [&](int k, int64_t at) {
      return args.g[k] == nullptr ? T(0) : static_cast<const T*>(args.g[k])[at];
    };
    T g(0), h(0), own(0), from_z(0);
    if (args.decompose) {
      const int64_t at = args.by_row ? i : 0;
      const T scale = static_cast<T>(1 / args.divisor);
      own = given(0, at) * scale;
      g = given(1, at) * scale - own;
      from_z = given(2, at) * scale;
      h = from_z - given(1, at) * scale;
    } else if (args.joint) {
      g = given(0, i);
    }
    if (lane == 0) {
      p.g[i] = args.joint ? g / p.stats(i)[1] : T(0);
      p.own[i] = own;
      p.from_z[i] = from_z;
    }
    for (int64_t d = lane; d < args.dims && args.marginals; d += kWarp)
      p.h[p.at(i, d)] = (args.decompose ? h : given(1, p.at(i, d))) / p.stats(i)[3 + 2 * d];
  });
}

// The share of component j in the marginal of row i, times the sum. (h has been divided by the sum.)
template <class T>
FASTVAE_DEVICE T marginal_share(const PairwiseParams<T>& p, int64_t i, int64_t j, int64_t d, T u) {
  return exponential_of_log_weight(p.marginal_exponent(i, j, d, u) - p.stats(i)[2 + 2 * d]);
}

// dL/dw_ij, and the part of dL/dl_ijd that is the same in all dimensions d.
template <class T>
struct Shares {
  T weight, all;
};
template <class T>
FASTVAE_DEVICE Shares<T> shares(const PairwiseParams<T>& p, int64_t i, int64_t j, bool want_weight) {
  Shares<T> s{T(0), T(0)};
  if (p.args.joint) s.all = p.g[i] * exponential_of_log_weight(p.joint_exponent(i, j, p.squares(i, j)) - p.stats(i)[0]);
  if (want_weight) {
    s.weight = s.all;
    for (int64_t d = 0; d < p.args.dims && p.args.marginals; ++d)
      s.weight = multiply_add(p.h[p.at(i, d)], marginal_share(p, i, j, d, p.distance(p.z(i, d), j, d)), s.weight);
  }
  if (i == j && p.args.decompose) s.all += p.own[i];
  return s;
}

// Shared memory for a share of each pair. (Not in a template, where the emulation would not find it.)
FASTVAE_DEVICE float* shared_shares(float) {
  __shared__ float values[kOwn * kChunk];
  return values;
}
FASTVAE_DEVICE double* shared_shares(double) {
  __shared__ double values[kOwn * kChunk];
  return values;
}

// kRows: a block owns rows and computes dz. Otherwise it owns components and computes their gradients.
template <class T, bool kRows>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ PairwiseParams<T> p) {
  const PairwiseArgs& args = p.args;
  T* const share = shared_shares(T());
  const int64_t own_count = kRows ? args.rows : args.components, others = kRows ? args.components : args.rows;
  T* const dz = static_cast<T*>(args.dz);
  T *const dmu = static_cast<T*>(args.dmu), *const dlogvar = static_cast<T*>(args.dlogvar);
  T* const dw = static_cast<T*>(args.dlog_weight);
  const int lane = static_cast<int>(threadIdx.x % kWarp), mine = static_cast<int>(threadIdx.x / kWarp);
  for (int64_t first = int64_t(blockIdx.x) * kOwn; first < own_count; first += int64_t(gridDim.x) * kOwn) {
    const int owned = static_cast<int>(min(int64_t(kOwn), own_count - first));
    // One thread adds to each element of the gradients.
    for (int64_t e = threadIdx.x; e < owned * args.dims; e += kThreads) {
      const int64_t at = first * args.dims + e;
      if (kRows) {
        dz[at] = p.from_z[first + e / args.dims] * static_cast<const T*>(args.z)[at];
      } else {
        if (dmu != nullptr) dmu[at] = T(0);
        if (dlogvar != nullptr) dlogvar[at] = T(0);
      }
    }
    double for_weight = 0;
    for (int64_t start = 0; start < others; start += kChunk) {
      const int count = static_cast<int>(min(int64_t(kChunk), others - start));
      if (mine < owned && lane < count) {
        const int64_t i = kRows ? first + mine : start + lane, j = kRows ? start + lane : first + mine;
        const Shares<T> s = shares(p, i, j, !kRows && dw != nullptr);
        share[mine * kChunk + lane] = s.all;
        if (!kRows && dw != nullptr) {
          for_weight += static_cast<double>(s.weight);
          if (args.weight_by_row) dw[i * args.components + j] = s.weight;
        }
      }
      __syncthreads();
      for (int64_t e = threadIdx.x; e < owned * args.dims; e += kThreads) {
        const int64_t at = first * args.dims + e, d = e % args.dims;
        const int own = static_cast<int>(e / args.dims);
        T sum(0), of_logvar(0);
        for (int c = 0; c < count; ++c) {
          const int64_t i = kRows ? first + own : start + c, j = kRows ? start + c : first + own;
          const T u = p.distance(p.z(i, d), j, d);
          T g = share[own * kChunk + c];
          if (args.marginals) g = multiply_add(p.h[p.at(i, d)], marginal_share(p, i, j, d, u), g);
          if (kRows) {
            sum = multiply_add(g * u, p.scale[p.at(j, d)], sum);
          } else {
            sum = sum + g * u;
            of_logvar = multiply_add(g, d_logvar(u), of_logvar);
          }
        }
        if (kRows) {
          dz[at] += T(-2) * sum;
        } else {
          if (dmu != nullptr) dmu[at] += T(2) * p.scale[at] * sum;
          if (dlogvar != nullptr) dlogvar[at] += of_logvar;
        }
      }
      __syncthreads();
    }
    if (!kRows && dw != nullptr && !args.weight_by_row) {
      for_weight = warp_sum(for_weight);
      if (lane == 0 && mine < owned) dw[first + mine] = static_cast<T>(for_weight);
    }
  }
}

// ---- On the host.

int64_t numbers(const PairwiseArgs& a, bool backward) {
  const int64_t forward = 2 * a.components * a.dims + a.components + a.dims + a.rows;
  return backward ? forward + a.rows * (3 + a.dims) : forward;
}
int64_t terms(const PairwiseArgs& a, bool backward) { return a.decompose && !backward ? 3 * a.rows : 0; }

template <class T>
PairwiseParams<T> params_of(const PairwiseArgs& args, bool backward, double* memory) {
  PairwiseParams<T> p;
  p.args = args;
  p.terms = memory;
  T* next = reinterpret_cast<T*>(memory + terms(args, backward));
  const auto take = [&](int64_t count) {
    T* const taken = next;
    next += count;
    return taken;
  };
  p.scale = take(args.components * args.dims);
  p.constant = take(args.components * args.dims);
  p.joint = take(args.components);
  p.bound = take(args.dims);
  p.base = take(args.rows);
  p.g = take(backward ? args.rows : 0);
  p.own = take(backward ? args.rows : 0);
  p.from_z = take(backward ? args.rows : 0);
  p.h = take(backward ? args.rows * args.dims : 0);
  return p;
}

template <class T>
cudaError_t pairwise_as(const PairwiseArgs& args, bool backward, const Launch& launch) {
  const PairwiseParams<T> p = params_of<T>(args, backward, launch.partials);
  constexpr int kWarps = kThreads / kWarp;
  const int64_t rows = ceil_div(args.rows, kWarps), components = ceil_div(args.components, kWarps);
  cudaError_t error = start<pack_kernel<T>>(std::max(rows, components), p, launch);
  if (error == cudaSuccess && args.marginals) error = start<bound_kernel<T>>(ceil_div(args.dims, kWarps), p, launch);
  if (!backward) {
    if (error == cudaSuccess) error = start<forward_kernel<T>>(rows, p, launch);
    if (error == cudaSuccess && args.decompose) error = start<terms_kernel<T>>(1, p, launch);
    return error;
  }
  if (error == cudaSuccess) error = start<upstream_kernel<T>>(rows, p, launch);
  if (error == cudaSuccess && args.dz != nullptr)
    error = start<backward_kernel<T, true>>(ceil_div(args.rows, kOwn), p, launch);
  if (error == cudaSuccess && (args.dmu != nullptr || args.dlogvar != nullptr || args.dlog_weight != nullptr))
    error = start<backward_kernel<T, false>>(ceil_div(args.components, kOwn), p, launch);
  return error;
}

}  // namespace

int64_t partials(const PairwiseArgs& args, bool backward) {
  return terms(args, backward) + (args.float64 ? numbers(args, backward) : ceil_div(numbers(args, backward), 2));
}

cudaError_t pairwise(const PairwiseArgs& args, bool backward, const Launch& launch) {
  return args.float64 ? pairwise_as<double>(args, backward, launch) : pairwise_as<float>(args, backward, launch);
}

}  // namespace fastvae::cuda
