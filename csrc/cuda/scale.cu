// The scaling of gradients that were made in the forward pass: all of them in one launch, which returns at once where
// the upstream gradient is 1. That is known on the device alone.
#include "reduce.cuh"

namespace fastvae::cuda {
namespace {

struct ScaleParams {
  struct Part {
    char* data;
    int64_t numel;
    DType dtype;
  };
  Part part[ScaleArgs::kMost];
  int count = 0;
  Number factor;
};

template <class S>
FASTVAE_DEVICE void scale_part(const ScaleParams::Part& part, Arithmetic<S> factor) {
  using T = Arithmetic<S>;
  constexpr int W = 16 / sizeof(S);
  S* const data = reinterpret_cast<S*>(part.data);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t packs = part.numel / W;
  for (int64_t pack = thread; pack < packs; pack += threads) {
    T x[W];
    widen_pack(load_pack<S, W>(data + pack * W), x);
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) x[j] = x[j] * factor;
    store_pack(data + pack * W, narrow_pack<S, W>(x));
  }
  if (const int64_t i = packs * W + thread; i < part.numel) narrow(static_cast<T>(widen(data[i])) * factor, data[i]);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const double factor = value_of(p.factor);
  if (factor == 1) return;
  for (int t = 0; t < p.count; ++t) {
    with_type(p.part[t].dtype, [&](auto type) {
      using S = decltype(type);
      scale_part<S>(p.part[t], static_cast<Arithmetic<S>>(factor));
    });
  }
}

}  // namespace

cudaError_t scale(const ScaleArgs& args, const Launch& launch) {
  ScaleParams params;
  params.factor = args.factor;
  int64_t most = 0;
  for (; params.count < args.count; ++params.count) {
    const View& view = args.tensor[params.count];
    const int64_t numel = args.numel[params.count];
    params.part[params.count] = {static_cast<char*>(view.data), numel, view.dtype};
    most = std::max(most, ceil_div(numel * size_of(view.dtype), 16));
  }
  if (most == 0) return cudaSuccess;
  const int64_t blocks =
      std::min<int64_t>(ceil_div(most, kThreads), multiprocessors(launch.device) * kBlocksPerMultiprocessor);
  return enqueue(scale_kernel, blocks, params, launch);
}

}  // namespace fastvae::cuda
