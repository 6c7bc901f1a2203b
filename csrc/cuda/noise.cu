// The noise by itself: philox_normal.
#include "noise.cuh"
#include "reduce.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
struct NormalParams {
  typename Elements<T>::Operand out;
  Noise noise;
  uint64_t start;
  int64_t numel;
  bool vectors;  // whole packs lie in one piece, and Philox calls do not straddle them
};

// A thread makes W elements at a time: whole Philox calls, whose first belongs to an element that W divides.
template <class S>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Arithmetic<S>>)
    normal_kernel(const __grid_constant__ NormalParams<Arithmetic<S>> p) {
  using T = Arithmetic<S>;
  constexpr int W = 16 / sizeof(S);
  const uint64_t seed = seed_of(p.noise), offset = offset_of(p.noise);
  if (p.noise.keep != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    p.noise.keep[0] = static_cast<int64_t>(seed);
    p.noise.keep[1] = static_cast<int64_t>(offset);
  }
  const int64_t before = static_cast<int64_t>(p.start % W);  // elements of the first pack that are not wanted
  const int64_t packs = (before + p.numel + W - 1) / W;
  for (int64_t pack = int64_t(blockIdx.x) * kThreads + threadIdx.x; pack < packs;
       pack += int64_t(gridDim.x) * kThreads) {
    T normal[W];
    draw_pack(seed, offset, static_cast<int64_t>(p.start - before) + pack * W, normal);
    const int64_t first = pack * W - before;
    if (p.vectors && first + W <= p.numel) {
      store_pack(static_cast<S*>(p.out.data) + first, narrow_pack<S, W>(normal));
      continue;
    }
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) {
      const T one[1] = {normal[j]};
      if (first + j >= 0 && first + j < p.numel) Elements<T>::template store<S>(p.out, first + j, one);
    }
  }
}

template <class S>
cudaError_t launch_normal(const NormalArgs& args, int64_t numel, const Launch& launch) {
  constexpr int W = 16 / sizeof(S);
  NormalParams<Arithmetic<S>> params;
  static_cast<View&>(params.out) = args.out;
  params.noise = args.noise;
  params.start = args.start;
  params.numel = numel;
  params.vectors = args.out.dims == 1 && args.out.stride[0] == 1 && args.start % W == 0 &&
                   reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0;
  const int64_t blocks = std::min<int64_t>(ceil_div(numel + W, int64_t(W) * kThreads),
                                           multiprocessors(launch.device) * kBlocksPerMultiprocessor);
  return enqueue(normal_kernel<S>, blocks, params, launch);
}

}  // namespace

cudaError_t normal(const NormalArgs& args, int64_t numel, const Launch& launch) {
  if (numel == 0) return cudaSuccess;
  switch (args.out.dtype) {
    case DType::float32:
      return launch_normal<float>(args, numel, launch);
    case DType::float64:
      return launch_normal<double>(args, numel, launch);
    case DType::bfloat16:
      return launch_normal<BFloat16>(args, numel, launch);
    case DType::float16:
      return launch_normal<Float16>(args, numel, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastvae::cuda
