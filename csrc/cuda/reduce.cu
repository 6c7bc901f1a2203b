#include <array>
#include <atomic>

#include "reduce.cuh"

namespace fastvae::cuda {
namespace {

struct FinishParams {
  Work recon, kl;  // whose items are the partial sums
  Target recon_target, kl_target;
  Combination combination;
  int64_t results = 0;
  bool by_warp = false;
};

// The sum of a result's partial sums; in the first thread of the group.
FASTVAE_DEVICE double sum_of_partials(const Work& work, const Target& target, int64_t result, bool by_warp) {
  const int64_t count = work.chunks == 0 ? work.items : work.chunks;
  const int size = by_warp ? kWarp : kThreads;
  double sum = 0;
  FASTVAE_UNROLL
  for (int64_t i = threadIdx.x % size; i < count; i += size) sum += target.partials[result * count + i];
  return group_sum(sum, by_warp);
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishParams p) {
  const int size = p.by_warp ? kWarp : kThreads, per_block = kThreads / size;
  for (int64_t result = int64_t(blockIdx.x) * per_block + threadIdx.x / size; result < p.results;
       result += int64_t(gridDim.x) * per_block) {
    double recon = 0, kl = 0;
    const bool first = threadIdx.x % size == 0;
    if (p.recon_target.partials != nullptr) {
      recon = sum_of_partials(p.recon, p.recon_target, result, p.by_warp);
      if (first) recon = put(p.recon_target.sums, result, recon);
    }
    if (p.kl_target.partials != nullptr) {
      kl = sum_of_partials(p.kl, p.kl_target, result, p.by_warp);
      if (first) kl = put(p.kl_target.sums, result, kl);
    }
    if (first && p.combination.loss != nullptr) combine(p.combination, result, recon, kl);
  }
}

bool is_alone(int64_t numel, const Sums& sums) { return sums.event == 0 && numel > 0 && numel <= kAlone; }

int64_t most_items(int64_t numel, const Sums& sums) {
  if (sums.data == nullptr) return 0;
  if (sums.event == 0) return std::max<int64_t>(sums.count, kMostBlocks);
  return sums.count * (sums.event <= kShortEvent ? 1 : ceil_div(sums.event, chunk_of(numel)));
}

}  // namespace

int multiprocessors(int device) {
  static std::array<std::atomic<int>, 64> known{};
  auto& count = known[device % known.size()];
  if (count == 0) {
    int value = 1;
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    count = value;
  }
  return count;
}

int64_t partials(int64_t numel, const Sums& sums) {
  const int64_t most = most_items(numel, sums);
  return is_alone(numel, sums) || most == sums.count ? 0 : most;
}

int64_t partials(int64_t recon_numel, const Sums& recon, int64_t kl_numel, const Sums& kl) {
  return is_alone(recon_numel, recon) && is_alone(kl_numel, kl)
             ? 0
             : most_items(recon_numel, recon) + most_items(kl_numel, kl);
}

cudaError_t finish(const Work& recon_work, const Target& recon, const Work& kl_work, const Target& kl,
                   const Combination& combination, const Launch& launch) {
  FinishParams params{recon_work, kl_work, recon, kl, combination};
  const bool has_recon = recon.partials != nullptr;
  params.results = (has_recon ? recon : kl).sums.count;
  if (params.results == 0) return cudaSuccess;
  params.by_warp = params.results > 1;
  const int64_t blocks = params.by_warp ? ceil_div(params.results, kThreads / kWarp) : 1;
  finish_kernel<<<static_cast<int>(std::min<int64_t>(blocks, kMostBlocks)), kThreads, 0, launch.stream>>>(params);
  return cudaGetLastError();
}

}  // namespace fastvae::cuda
