// The noise alone: philox_normal.
#include "noise.cuh"
#include "reduce.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
struct NormalParams {
  RowOperand rows;  // absent if a Philox call belongs to two packs
  typename Elements<T, false>::Operand elements;
  Noise noise;
  uint64_t start;
  int64_t numel;
};

// A thread draws W elements at a time with whole Philox calls. The index of the first element is a multiple of W.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    normal_kernel(const __grid_constant__ NormalParams<T> p) {
  using Access = Rows<T, W, false>;
  const uint64_t seed = seed_of(p.noise), offset = offset_of(p.noise);
  keep(p.noise, seed, offset);
  const int64_t before = static_cast<int64_t>(p.start % W);  // elements of the first pack that are not wanted
  const int64_t packs = (before + p.numel + W - 1) / W;
  for (int64_t pack = int64_t(blockIdx.x) * kThreads + threadIdx.x; pack < packs;
       pack += int64_t(gridDim.x) * kThreads) {
    T normal[W];
    draw_pack(seed, offset, static_cast<int64_t>(p.start - before) + pack * W, normal);
    const int64_t first = pack * W - before;
    if (p.rows && first + W <= p.numel) {
      Access::store(p.rows, Access::place({}, pack), normal);
      continue;
    }
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) {
      const T one[1] = {normal[j]};
      if (first + j >= 0 && first + j < p.numel) Elements<T, false>::store(p.elements, {first + j}, one);
    }
  }
}

template <class T, int W>
cudaError_t launch_normal(const NormalArgs& args, int64_t numel, const Launch& launch) {
  NormalParams<T> params;
  RowFit rows(numel, 0, kDType<T>);
  rows.add(args.out);
  bool fits = rows.fits(W) && args.out.dims == 1 && args.start % W == 0;
  const RowOperand operand = rows.operand(args.out, W, fits);
  if (fits) params.rows = operand;
  static_cast<View&>(params.elements) = args.out;
  params.noise = args.noise;
  params.start = args.start;
  params.numel = numel;
  return start<normal_kernel<T, W>>(ceil_div(numel + W, int64_t(W) * kThreads), params, launch);
}

}  // namespace

cudaError_t normal(const NormalArgs& args, int64_t numel, const Launch& launch) {
  if (numel == 0) return cudaSuccess;
  switch (args.out.dtype) {
    case DType::float32:
      return launch_normal<float, 4>(args, numel, launch);
    case DType::float64:
      return launch_normal<double, 2>(args, numel, launch);
    default:
      return launch_normal<float, 8>(args, numel, launch);
  }
}

}  // namespace fastvae::cuda
