// Sums in a fixed order, without atomics. A thread adds up a few packs in the arithmetic's type, and these sums in
// double. A group of threads adds up its threads' sums. If there are several groups, finish() adds up the groups' sums.
#pragma once

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "memory.cuh"

namespace fastvae::cuda {

constexpr int kBlockBits = 8, kWarpBits = 5;
constexpr int kThreads = 1 << kBlockBits;  // in a block
constexpr int kWarp = 1 << kWarpBits;
// The most partial sums of one sum over all elements.
constexpr int kMostBlocks = 1024;
// Up to this number of elements, one block is faster than two launches.
constexpr int64_t kAlone = 4096;
// A warp, or a part of it, adds up a sample of up to kShortEvent elements. A block adds up a chunk of a longer sample.
constexpr int64_t kShortEvent = 1024, kShortChunk = 4096, kLongChunk = 32768, kManyElements = int64_t(1) << 24;

// How the packs of a pass are divided. A group of threads works on one item after another. Each item has a sum.
struct Work {
  int64_t items = 0;
  int64_t chunks = 0;           // items of a sample; 0: one sum over all elements, of which each item takes some tiles
  int64_t row = 0;              // packs of a sample, or of all elements
  int64_t chunk = 0;            // packs of a chunk
  int rest = 0;                 // elements behind the last pack
  int group_bits = kBlockBits;  // a group has 2^this threads: a block, a warp, or less where samples have a few packs
  int blocks = 0;

  // Whether an item's sum is a result, and not a part of one.
  bool is_whole() const { return chunks == 0 ? items == 1 : chunks == 1; }
};

// Adds in pairs, so that few additions wait for each other.
template <int W, class T>
FASTVAE_DEVICE T pack_sum(const T (&x)[W]) {
  T part[W];
  FASTVAE_UNROLL
  for (int j = 0; j < W; ++j) part[j] = x[j];
  FASTVAE_UNROLL
  for (int half = W / 2; half > 0; half /= 2) {
    FASTVAE_UNROLL
    for (int j = 0; j < half; ++j) part[j] += part[j + half];
  }
  return part[0];
}

// The sum over a warp, or over each group of 2^bits threads in it.
FASTVAE_DEVICE double warp_sum(double x, int bits = kWarpBits) {
  FASTVAE_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (step >> bits == 0) x += __shfl_xor_sync(0xffffffffu, x, step);
  }
  return x;
}

// The sum over a group, valid in its first thread.
FASTVAE_DEVICE double group_sum(double x, int bits = kBlockBits) {
  x = warp_sum(x, bits);
  if (bits <= kWarpBits) return x;
  __shared__ double warps[kThreads / kWarp];
  __syncthreads();  // the last sum's readers are done
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  FASTVAE_UNROLL
  for (int w = 0; w < kThreads / kWarp; ++w) x += warps[w];
  return x;
}

// Calls visit(item, lane, exists) for each item of the thread's group. All threads of a warp make the same number of
// calls, since they share shuffles. So the last item of a group may not exist.
template <class Visit>
FASTVAE_DEVICE void for_each_item(int64_t items, int bits, int block, int blocks, Visit visit) {
  const int thread = static_cast<int>(threadIdx.x), group = thread >> bits, lane = thread & ((1 << bits) - 1);
  const int first = thread / kWarp * kWarp >> bits, per_block = kThreads >> bits;  // first: the warp's first group
  for (int64_t item = int64_t(block) * per_block + first; item < items; item += int64_t(blocks) * per_block)
    visit(item + (group - first), lane, item + (group - first) < items);
}

// Calls work(row, lane) for each row, by a warp.
template <class Work>
FASTVAE_DEVICE void for_each_by_warp(int64_t rows, Work work) {
  const int warps = kThreads / kWarp, lane = static_cast<int>(threadIdx.x % kWarp);
  for (int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; i < rows; i += int64_t(gridDim.x) * warps)
    work(i, lane);
}

// Runs the work of a group. `pass` is a function object with
//   T packs<n>(first, distance)   works on n packs, first, first + distance, ..., and returns the sum of their values
//   T single(element)             the same for an element that belongs to no pack
// The first thread of the group calls result(item, sum).
template <int kUnroll, class Pass, class Result>
FASTVAE_DEVICE void do_work(const Work& work, int width, int block, Pass pass, Result result) {
  const int size = 1 << work.group_bits, tile = size * kUnroll;
  for_each_item(work.items, work.group_bits, block, work.blocks, [&](int64_t item, int lane, bool exists) {
    int64_t first = item * tile, end = work.row, stride = work.items * tile;
    if (work.chunks > 0) {
      // (With more than one chunk, samples are long and so few that 32 bits are enough.)
      const int64_t sample = work.chunks == 1 ? item : static_cast<uint32_t>(item) / static_cast<uint32_t>(work.chunks);
      const int64_t begin = sample * work.row + (item - sample * work.chunks) * work.chunk;
      first = begin;
      end = min(begin + work.chunk, (sample + 1) * work.row);
      stride = tile;
    }
    if (!exists) end = first;
    double sum = 0;
    for (int64_t pack = first + lane; pack < end; pack += stride) {
      if (pack + (kUnroll - 1) * size < end) {
        sum += static_cast<double>(pass.template packs<kUnroll>(pack, size));
      } else {  // (only if kUnroll > 1) the last tile
        for (int64_t one = pack; one < end; one += size) sum += static_cast<double>(pass.template packs<1>(one, size));
      }
    }
    if (item == 0 && lane < work.rest) sum += static_cast<double>(pass.single(work.row * width + lane));
    sum = group_sum(sum, work.group_bits);
    if (lane == 0 && exists) result(item, sum);
  });
}

// Writes a result and returns its rounded value.
FASTVAE_DEVICE double write(void* data, bool float64, int64_t i, double x) {
  if (float64) return static_cast<double*>(data)[i] = x;
  return static_cast<float*>(data)[i] = static_cast<float>(x);
}
FASTVAE_DEVICE double put(const Sums& sums, int64_t i, double sum) {
  return write(sums.data, sums.float64, i, sum / sums.divisor / value_of(sums.divisor_at));
}
FASTVAE_DEVICE void combine(const Combination& c, int64_t i, double recon, double kl) {
  write(c.loss, c.float64, i, recon + c.beta * value_of(c.weight) * kl);
}

// Where the sums of a pass go: to their places if they are whole, else to partials, for finish().
struct Target {
  Sums sums;
  double* partials = nullptr;

  // Returns the rounded value of a whole sum.
  FASTVAE_DEVICE double operator()(int64_t item, double sum) const {
    if (partials != nullptr) return partials[item] = sum;
    return sums.data == nullptr ? sum : put(sums, item, sum);
  }
};

// ---- On the host.

// Every kernel is launched here.
template <class Params>
cudaError_t enqueue(void (*kernel)(Params), int64_t blocks, const Params& params, const Launch& launch) {
  static_assert(sizeof(Params) <= 4096, "more than a kernel's parameters may take before CUDA 12.1");
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, launch.stream);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of blocks that a device runs at once. CUDA is asked once for each kernel and device.
template <auto kKernel>
int64_t resident_blocks(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  auto& blocks = known[device % kDevices];
  if (blocks == 0) {
    int multiprocessors = 1, each = 1;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, reinterpret_cast<const void*>(kKernel), kThreads, 0);
    blocks = std::max(1, multiprocessors * each);
  }
  return blocks;
}

// Launches as many of `blocks` as run at once.
template <auto kKernel, class Params>
cudaError_t start(int64_t blocks, const Params& params, const Launch& launch) {
  if (blocks == 0) return cudaSuccess;
  return enqueue<Params>(kKernel, std::min(blocks, resident_blocks<kKernel>(launch.device)), params, launch);
}

inline bool is_alone(int64_t numel, const Sums& sums) {
  return sums.data != nullptr && sums.event == 0 && numel > 0 && numel <= kAlone;
}
inline int64_t chunk_of(int64_t numel) { return numel <= kManyElements ? kShortChunk : kLongChunk; }

// The size of groups for sums of `count` numbers each: at most a warp.
inline int group_bits_for(int64_t count) {
  int bits = 0;
  while (bits < kWarpBits && int64_t(1) << bits < count) ++bits;
  return bits;
}

// Divides packs of `width` elements among at most `most` blocks, or gives all to one block if `alone`. A thread takes
// `unroll` packs at a time. (The sum of a sample does not depend on the device. The sum over all elements does: the
// device determines `most`.)
inline Work share_out(int64_t numel, const Sums& sums, int width, int unroll, int64_t most, bool alone) {
  Work work;
  most = std::min<int64_t>(most, kMostBlocks);
  if (numel == 0) {  // nothing to read, but there may be sums to write
    work.items = sums.data == nullptr ? 0 : sums.count;
    work.chunks = 1;
    work.blocks = static_cast<int>(std::min(work.items, most));
    return work;
  }
  if (sums.event == 0) {
    work.row = numel / width;
    work.rest = static_cast<int>(numel % width);
    const int64_t tiles = alone ? 1 : std::max<int64_t>(1, ceil_div(work.row, int64_t(kThreads) * unroll));
    work.items = std::min(tiles, most);
    work.blocks = static_cast<int>(work.items);
    return work;
  }
  const bool is_short = sums.event <= kShortEvent;
  const int64_t chunk = is_short ? sums.event : chunk_of(numel);
  work.row = sums.event / width;
  if (is_short) work.group_bits = group_bits_for(work.row);
  work.chunk = chunk / width;
  work.chunks = ceil_div(sums.event, chunk);
  work.items = sums.count * work.chunks;
  work.blocks = static_cast<int>(std::min(ceil_div(work.items, kThreads >> work.group_bits), most));
  return work;
}

}  // namespace fastvae::cuda
