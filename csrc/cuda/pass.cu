// The functions that the ops call, for any formula, and the last step of sums.
#include "../formulas/list.h"
#include "fold.cuh"

namespace fastvae::cuda {

Folding folding_of(const PassArgs& args) {
  Folding f;
  int64_t edge[kMaxFolded * kMaxDims + 2] = {1, std::max<int64_t>(args.numel, 1)};  // products of the last sizes
  int edges = 2;
  const auto add = [&](const View& view, bool is_value) {
    const int64_t numel = folded_size(view);
    if (numel == 0) return;
    f.result[f.count++] = {view.data, view.dtype, numel, is_value};
    int64_t product = 1;
    for (int d = view.dims - 1; d >= 0 && args.numel > 0; --d) edge[edges++] = product *= view.size[d];
  };
  for (const View& d : args.d) add(d, false);
  add(args.value, true);
  if (f.count == 0) return f;
  if (args.may_be_kept) f.upstream = {args.upstream.data, args.upstream.dtype};
  if (args.numel == 0) return f;  // all sums are 0
  // The common dimensions of all folded results: each product divides the next.
  std::sort(edge, edge + edges);
  edges = static_cast<int>(std::unique(edge, edge + edges) - edge);
  f.dims = std::max(1, edges - 1);
  f.size[0] = 1;
  for (int d = 0; d < edges - 1; ++d) f.size[d] = edge[edges - 1 - d] / edge[edges - 2 - d];
  int r = 0;
  const auto mark = [&](const View& view) {
    if (folded_size(view) == 0) return;
    int64_t product = 1;
    int d = f.dims - 1;
    for (int v = view.dims - 1; v >= 0; --v) {
      int64_t stride = view.stride[v];
      for (const int64_t end = product * view.size[v]; product < end; product *= f.size[d--]) {
        f.result[r].stride[d] = stride;
        if (stride != 0) f.result[r].kept |= 1u << d;
        stride *= f.size[d];
      }
    }
    ++r;
  };
  for (const View& d : args.d) mark(d);
  mark(args.value);
  // A tile takes as much of the last dimensions as fits. If a result keeps a dimension and sums over one before it, the
  // tile first takes only 64 of it, so that the tile has several elements of each sum.
  int64_t room = kTile;
  for (const int64_t most : {int64_t(64), int64_t(kTile)}) {
    for (int d = f.dims - 1; d >= 0; --d) {
      bool crossed = false;
      for (r = 0; r < f.count; ++r)
        crossed |= (f.result[r].kept >> d & 1) && (~f.result[r].kept & ((1u << d) - 1)) != 0;
      const int64_t before = most == 64 ? 1 : f.tile[d];
      f.tile[d] = static_cast<int>(std::min({f.size[d], before * room, crossed ? most : int64_t(kTile)}));
      room = room * before / f.tile[d];
    }
  }
  // A slab begins as a tile and is doubled, each time along the dimension that leaves the fewest partial sums.
  const auto measure = [&] {
    f.slabs = 1;
    for (int d = 0; d < f.dims; ++d) f.slabs *= ceil_div(f.size[d], f.slab[d]);
    f.width = 0;
    for (r = 0; r < f.count; ++r) {
      f.result[r].begin = f.width;
      int64_t sums = 1;
      for (int d = 0; d < f.dims; ++d) sums *= f.result[r].kept >> d & 1 ? f.slab[d] : 1;
      f.width += sums;
    }
    return f.partials();
  };
  for (int d = 0; d < f.dims; ++d) f.slab[d] = f.tile[d];
  for (measure(); f.slabs > kMostSlabs; measure()) {
    int best = -1;
    int64_t fewest = 0;
    for (int d = 0; d < f.dims; ++d) {
      const int64_t before = f.slab[d];
      if (before == f.size[d]) continue;
      f.slab[d] = std::min(f.size[d], 2 * before);
      const int64_t sums = measure();
      f.slab[d] = before;
      if (best >= 0 && sums >= fewest) continue;
      best = d;
      fewest = sums;
    }
    f.slab[best] = std::min(f.size[best], 2 * f.slab[best]);
  }
  for (int d = 0; d < f.dims; ++d) f.along[d] = static_cast<int>(ceil_div(f.size[d], f.slab[d]));
  return f;
}

namespace {

struct FinishParams {
  Part part[2];  // reconstruction and KL, or a single pass
  Combination combination;
  int64_t results = 0;  // number of sums in each part
  int group_bits = kBlockBits;
  int blocks = 0;  // for the sums; the other blocks are for folded results
};

// A result: the sum of its partial sums, which is written to its place. If there are no partial sums, the result is
// what is there already. Valid in the first thread of the group.
FASTVAE_DEVICE double result_of(const Work& work, const Target& target, int64_t result, bool exists, int lane,
                                int bits) {
  const Sums& sums = target.sums;
  if (target.partials == nullptr) {
    if (sums.data == nullptr || lane != 0 || !exists) return 0;
    return sums.float64 ? static_cast<const double*>(sums.data)[result] : static_cast<const float*>(sums.data)[result];
  }
  const int64_t count = work.chunks == 0 ? work.items : work.chunks;
  double sum = 0;
  for (int64_t i = lane; i < count && exists; i += 1 << bits) sum += target.partials[result * count + i];
  sum = group_sum(sum, bits);
  return lane == 0 && exists ? put(sums, result, sum) : 0;
}

__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ FinishParams p) {
  if (static_cast<int>(blockIdx.x) < p.blocks) {
    for_each_item(p.results, p.group_bits, blockIdx.x, p.blocks, [&](int64_t result, int lane, bool exists) {
      const double recon = result_of(p.part[0].work, p.part[0].target, result, exists, lane, p.group_bits);
      const double kl = result_of(p.part[1].work, p.part[1].target, result, exists, lane, p.group_bits);
      if (lane == 0 && exists && p.combination.loss != nullptr) combine(p.combination, result, recon, kl);
    });
    return;
  }
  constexpr int kWarps = kThreads / kWarp;
  const int block = static_cast<int>(blockIdx.x) - p.blocks, warps = (static_cast<int>(gridDim.x) - p.blocks) * kWarps;
#pragma unroll 1
  for (const Part& part : p.part) {
#pragma unroll 1
    for (int r = 0; r < part.fold.count; ++r) {
      for (int64_t out = block * kWarps + threadIdx.x / kWarp; out < part.fold.result[r].numel; out += warps)
        finish_fold(part.fold, part.fold.result[r], part.partials, part.target.sums, static_cast<int>(out));
    }
  }
}

}  // namespace

cudaError_t finish(const Part (&part)[2], const Combination& combination, const Launch& launch) {
  FinishParams params{{part[0], part[1]}, combination};
  if (combination.loss != nullptr || part[0].target.partials != nullptr || part[1].target.partials != nullptr)
    params.results = (part[0].target.sums.data != nullptr ? part[0] : part[1]).target.sums.count;
  if (params.results > 1) params.group_bits = group_bits_for(std::max(part[0].work.chunks, part[1].work.chunks));
  params.blocks =
      static_cast<int>(std::min<int64_t>(ceil_div(params.results, kThreads >> params.group_bits), kMostBlocks));
  int64_t folded = 0;
  for (const Part& one : part)
    for (int r = 0; r < one.fold.count; ++r) folded = std::max(folded, one.fold.result[r].numel);
  const int64_t blocks = params.blocks + std::min<int64_t>(ceil_div(folded, kThreads / kWarp), kMostBlocks);
  return blocks == 0 ? cudaSuccess : enqueue(finish_kernel, blocks, params, launch);
}

namespace {

// The most partial sums that a pass may leave to finish().
int64_t room_for(const PassArgs& args) {
  const Sums& sums = args.sums;
  if (const Folding f = folding_of(args); f.count > 0) return f.partials() + f.slabs;
  if (sums.data == nullptr) return 0;
  if (sums.event == 0) return std::max<int64_t>(sums.count, kMostBlocks);
  return sums.count * (sums.event <= kShortEvent ? 1 : ceil_div(sums.event, chunk_of(args.numel)));
}

bool is_alone(const PassArgs& args) { return folding_of(args).count == 0 && cuda::is_alone(args.numel, args.sums); }

void prepare(const PassArgs& args, double* partials, Part& part) {
  part.target.sums = args.sums;
  part.fold = folding_of(args);
  part.partials = partials;
}

cudaError_t run_formula(const PassArgs& args, const PassArgs* kl, const Combination& combination, Part (&part)[2],
                        const Launch& launch) {
#define FASTVAE_RUN(F) run<F>,
  static constexpr decltype(&run<NoLoss>) kRuns[] = {FASTVAE_FORMULAS(FASTVAE_RUN)};
#undef FASTVAE_RUN
  return (args.formula < 0 ? run<NoLoss> : kRuns[args.formula])(args, kl, combination, part, launch);
}

}  // namespace

int64_t partials(const PassArgs& args) {
  const int64_t room = room_for(args);
  return is_alone(args) || (room == args.sums.count && args.sums.event > 0) ? 0 : room;
}

int64_t partials(const PassArgs& recon, const PassArgs& kl) {
  return is_alone(recon) && is_alone(kl) ? 0 : room_for(recon) + room_for(kl);
}

cudaError_t pass(const PassArgs& args, const Launch& launch) {
  Part part[2];
  prepare(args, launch.partials, part[0]);
  if (const cudaError_t error = run_formula(args, nullptr, {}, part, launch)) return error;
  return part[0].is_finished() ? cudaSuccess : finish(part, {}, launch);
}

cudaError_t objective(const PassArgs& recon, const PassArgs& kl, const Combination& combination, const Launch& launch) {
  if (combination.loss == nullptr) {  // gradients, perhaps of one part alone
    if (recon.numel == 0 && folding_of(recon).count == 0) return pass(kl, launch);
    if (kl.numel == 0 && folding_of(kl).count == 0) return pass(recon, launch);
  }
  Part part[2];
  prepare(recon, launch.partials, part[0]);
  prepare(kl, launch.partials + room_for(recon), part[1]);
  // A kernel for both has one arithmetic, one direction, and the KL to the standard prior.
  const auto is_backward = [](const PassArgs& args) { return args.upstream.data != nullptr; };
#define FASTVAE_IS_STANDARD(F) std::is_same_v<F, KlStandard>,
  static constexpr bool kIsStandard[] = {FASTVAE_FORMULAS(FASTVAE_IS_STANDARD)};
#undef FASTVAE_IS_STANDARD
  if (part[0].fold.count == 0 && part[1].fold.count == 0 && recon.float64 == kl.float64 &&
      is_backward(recon) == is_backward(kl) && kl.formula >= 0 && kIsStandard[kl.formula] && kl.z.data == nullptr &&
      kl.dz.data == nullptr) {
    if (const cudaError_t error = run_formula(recon, &kl, combination, part, launch)) return error;
    const bool alone = combination.loss != nullptr && is_alone(recon) && is_alone(kl);
    if (alone || (combination.loss == nullptr && part[0].is_finished() && part[1].is_finished())) return cudaSuccess;
    return finish(part, combination, launch);
  }
  Part other[2];
  prepare(kl, launch.partials + room_for(recon), other[0]);
  if (const cudaError_t error = run_formula(recon, nullptr, {}, part, launch)) return error;
  if (const cudaError_t error = run_formula(kl, nullptr, {}, other, launch)) return error;
  part[1] = other[0];
  return finish(part, combination, launch);
}

}  // namespace fastvae::cuda
