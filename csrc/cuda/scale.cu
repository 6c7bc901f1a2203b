// Scales the gradients that the forward pass made, all in one launch. The kernel returns at once if the upstream
// gradient is 1, which only the device knows.
#include "reduce.cuh"

namespace fastvae::cuda {
namespace {

struct ScaleParams {
  struct Part {
    RowOperand operand;
    int64_t numel;
  };
  Part part[ScaleArgs::kMost];
  int count = 0;
  Number factor;
};

template <class Access, class T>
FASTVAE_DEVICE void scale_pack(const RowOperand& operand, int64_t pack, T factor) {
  const auto at = Access::place({}, pack);
  T x[Access::kWidth];
  Access::unpack(operand, Access::load(operand, at), x);
  FASTVAE_UNROLL
  for (int j = 0; j < Access::kWidth; ++j) x[j] = x[j] * factor;
  Access::store(operand, at, x);
}

template <class Access>
FASTVAE_DEVICE void scale_part(const ScaleParams::Part& part, typename Access::Type factor) {
  constexpr int W = Access::kWidth;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t pack = thread; pack < part.numel / W; pack += threads) scale_pack<Access>(part.operand, pack, factor);
  if (const int64_t i = part.numel / W * W + thread; i < part.numel)
    scale_pack<typename Access::Singles>(part.operand, i, factor);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const double factor = value_of(p.factor);
  if (factor == 1) return;
  for (int t = 0; t < p.count; ++t) {
    if (p.part[t].operand.dtype == DType::float64) {
      scale_part<Rows<double, 2, false>>(p.part[t], factor);
    } else {
      scale_part<Rows<float, 8, false>>(p.part[t], static_cast<float>(factor));
    }
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
    bool fits = true;  // contiguous
    const RowFit rows(numel, 0, view.dtype == DType::float64 ? DType::float64 : DType::float32);
    params.part[params.count] = {rows.operand(view, view.dtype == DType::float64 ? 2 : 8, fits), numel};
    most = std::max(most, ceil_div(numel, 8));
  }
  return start<scale_kernel>(ceil_div(most, kThreads), params, launch);
}

}  // namespace fastvae::cuda
