// Gaussians with full covariance on a GPU. A warp takes a row of T, and its lanes take the columns.
#include "../cuda/reduce.cuh"
#include "multivariate.h"

namespace fastvae::cuda {
namespace {

template <class T>
struct MultivariateParams {
  MultivariateArgs args;
  double* terms;  // [B, L] of the KL

  // The element of a [B, L] tensor; 0 if the tensor is absent. What an absent gradient would multiply is absent too: 0
  // times infinity would be NaN.
  FASTVAE_DEVICE T at(const void* from, int64_t b, int64_t i) const {
    return from == nullptr ? T(0) : static_cast<const T*>(from)[b * args.dims + i];
  }
  FASTVAE_DEVICE int64_t place(int64_t b, int64_t i) const { return b * args.size() + args.row(i); }
  FASTVAE_DEVICE const T* row(int64_t b, int64_t i) const {
    return static_cast<const T*>(args.scale_tril) + place(b, i);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) multivariate_kernel(const __grid_constant__ MultivariateParams<T> p) {
  const MultivariateArgs& args = p.args;
  for_each_by_warp(args.rows * args.dims, [&](int64_t item, int lane) {
    const int64_t b = item / args.dims, i = item % args.dims;
    const T* row = p.row(b, i);
    T dot(0), squares(0);
    for (int64_t j = lane; j < i; j += kWarp) {
      dot = multiply_add(row[j], p.at(args.eps, b, j), dot);
      squares = multiply_add(row[j], row[j], squares);
    }
    const double sum = warp_sum(static_cast<double>(squares));
    const T moved = args.z == nullptr ? T(0) : static_cast<T>(warp_sum(static_cast<double>(dot)));
    if (lane != 0) return;
    const T mu = p.at(args.mu, b, i);
    p.terms[item] = 0.5 * (sum + static_cast<double>(mu * mu)) + static_cast<double>(diagonal_term(row[i]).value);
    if (args.z != nullptr) static_cast<T*>(args.z)[item] = mu + multiply_add(row[i], p.at(args.eps, b, i), moved);
  });
}

// The sums of the terms, each by 2^bits threads.
template <class T>
__global__ void __launch_bounds__(kThreads) multivariate_sums(const __grid_constant__ MultivariateParams<T> p) {
  const MultivariateArgs& args = p.args;
  const int64_t count = args.rows * args.dims / args.kl.count;
  const int bits = count <= kShortEvent ? kWarpBits : kBlockBits;
  for_each_item(args.kl.count, bits, blockIdx.x, gridDim.x, [&](int64_t item, int lane, bool exists) {
    double sum = 0;
    for (int64_t k = lane; k < count && exists; k += 1 << bits) sum += p.terms[item * count + k];
    sum = group_sum(sum, bits);
    if (lane == 0 && exists) put(args.kl, item, sum);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) multivariate_gradients(const __grid_constant__ MultivariateParams<T> p) {
  const MultivariateArgs& args = p.args;
  for_each_by_warp(args.rows * args.dims, [&](int64_t item, int lane) {
    const int64_t b = item / args.dims, i = item % args.dims;
    const T g = args.upstream<T>(b), dz = p.at(args.dz, b, i);
    const void *eps = args.dz != nullptr ? args.eps : nullptr, *mu = args.g != nullptr ? args.mu : nullptr;
    if (args.dmu != nullptr && lane == 0) static_cast<T*>(args.dmu)[item] = dz + g * p.at(mu, b, i);
    if (args.dscale_tril == nullptr) return;
    const T* row = p.row(b, i);
    T* to = static_cast<T*>(args.dscale_tril) + p.place(b, i);
    for (int64_t j = lane; j < (args.packed ? i + 1 : args.dims); j += kWarp) {
      const T slope = args.g == nullptr || j > i ? T(0) : j < i ? row[j] : diagonal_term(row[i]).d;
      to[j] = j > i ? T(0) : d_scale_tril(dz, p.at(eps, b, j), g, slope);
    }
  });
}

// A thread takes a column.
template <class T>
__global__ void __launch_bounds__(kThreads) multivariate_deps(const __grid_constant__ MultivariateParams<T> p) {
  const MultivariateArgs& args = p.args;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t item = first; item < args.rows * args.dims; item += int64_t(gridDim.x) * kThreads) {
    const int64_t b = item / args.dims, j = item % args.dims;
    T sum(0);
    for (int64_t i = j; i < args.dims && args.dz != nullptr; ++i)
      sum = multiply_add(p.row(b, i)[j], p.at(args.dz, b, i), sum);
    static_cast<T*>(args.deps)[item] = sum;
  }
}

template <class T>
cudaError_t multivariate_as(const MultivariateArgs& args, bool backward, const Launch& launch) {
  constexpr int kWarps = kThreads / kWarp;
  const MultivariateParams<T> p{args, launch.partials};
  const int64_t items = args.rows * args.dims;
  if (!backward) {
    const cudaError_t error = start<multivariate_kernel<T>>(ceil_div(items, kWarps), p, launch);
    return error == cudaSuccess ? start<multivariate_sums<T>>(args.kl.count, p, launch) : error;
  }
  const cudaError_t error = args.dmu == nullptr && args.dscale_tril == nullptr
                                ? cudaSuccess
                                : start<multivariate_gradients<T>>(ceil_div(items, kWarps), p, launch);
  if (error != cudaSuccess || args.deps == nullptr) return error;
  return start<multivariate_deps<T>>(ceil_div(items, kThreads), p, launch);
}

}  // namespace

int64_t partials(const MultivariateArgs& args, bool backward) { return backward ? 0 : args.rows * args.dims; }

cudaError_t multivariate(const MultivariateArgs& args, bool backward, const Launch& launch) {
  return args.float64 ? multivariate_as<double>(args, backward, launch)
                      : multivariate_as<float>(args, backward, launch);
}

}  // namespace fastvae::cuda
