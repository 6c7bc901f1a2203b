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

// A result: the sum of its partial sums, written to its place, or what is there already if there are none. In the first
// thread of the group.
FASTVAE_DEVICE double result_of(const Work& work, const Target& target, int64_t result, bool by_warp) {
  const int size = by_warp ? kWarp : kThreads, lane = threadIdx.x % size;
  const Sums& sums = target.sums;
  if (target.partials == nullptr) {
    if (sums.data == nullptr || lane != 0) return 0;
    return sums.float64 ? static_cast<const double*>(sums.data)[result] : static_cast<const float*>(sums.data)[result];
  }
  const int64_t count = work.chunks == 0 ? work.items : work.chunks;
  double sum = 0;
  for (int64_t i = lane; i < count; i += size) sum += target.partials[result * count + i];
  sum = group_sum(sum, by_warp);
  return lane == 0 ? put(sums, result, sum) : 0;
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishParams p) {
  const int size = p.by_warp ? kWarp : kThreads, per_block = kThreads / size;
  for (int64_t result = int64_t(blockIdx.x) * per_block + threadIdx.x / size; result < p.results;
       result += int64_t(gridDim.x) * per_block) {
    const double recon = result_of(p.recon, p.recon_target, result, p.by_warp);
    const double kl = result_of(p.kl, p.kl_target, result, p.by_warp);
    if (threadIdx.x % size == 0 && p.combination.loss != nullptr) combine(p.combination, result, recon, kl);
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
  params.results = (recon.sums.data != nullptr ? recon : kl).sums.count;
  if (params.results == 0) return cudaSuccess;
  params.by_warp = params.results > 1;
  const int64_t blocks = params.by_warp ? ceil_div(params.results, kThreads / kWarp) : 1;
  return enqueue(finish_kernel, std::min<int64_t>(blocks, kMostBlocks), params, launch);
}

}  // namespace fastvae::cuda
