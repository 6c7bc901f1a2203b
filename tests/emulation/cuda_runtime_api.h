// CUDA on the CPU, as far as csrc/cuda needs it, so that the kernels can be run where there is no GPU: one block after
// the other, its threads as fibers that take turns at each barrier and shuffle. It shows where a kernel reads and
// writes and what it adds up; nothing about races between blocks, speed, or the device's own arithmetic.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMultiProcessorCount };
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};

namespace emulation {

struct Index {
  unsigned x = 0;
};
inline Index thread_index, block_index, grid_size;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  bool done = false;
};
// Threads that wait for one another.
struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<double> shuffled;

inline void enter() {
  body();
  Fiber& fiber = fibers[thread_index.x];
  fiber.done = true;
  swapcontext(&fiber.context, &scheduler);
}

inline void wait(Barrier& barrier, int threads) {
  const int64_t mine = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == mine) swapcontext(&fibers[thread_index.x].context, &scheduler);
}

inline void run_block(int threads) {
  block_barrier = {};
  warp_barriers.assign(threads / 32, {});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads, turns = 0; left > 0; ++turns) {
    if (turns > 1000000) std::fputs("emulation: the threads of a block wait for each other\n", stderr), std::abort();
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      thread_index.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      left -= fibers[t].done;
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  if (blocks.x == 0 || threads.x % 32 != 0) return cudaErrorInvalidValue;
  emulation::fibers.resize(threads.x);
  emulation::shuffled.resize(threads.x);
  emulation::grid_size.x = blocks.x;
  emulation::body = [&] { kernel(*static_cast<const Params*>(arguments[0])); };
  for (unsigned b = 0; b < blocks.x; ++b) {
    emulation::block_index.x = b;
    emulation::run_block(static_cast<int>(threads.x));
  }
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 7;  // few, so that blocks have to go round more than once
  return cudaSuccess;
}

inline void __syncthreads() { emulation::wait(emulation::block_barrier, static_cast<int>(emulation::fibers.size())); }
inline double __shfl_xor_sync(uint32_t, double x, int mask) {
  const unsigned thread = emulation::thread_index.x;
  emulation::Barrier& warp = emulation::warp_barriers[thread / 32];
  emulation::shuffled[thread] = x;
  emulation::wait(warp, 32);
  const double other = emulation::shuffled[thread ^ mask];
  emulation::wait(warp, 32);
  return other;
}

template <class To, class From>
To emulated_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline void __stwb(uint4* to, uint4 x) { *to = x; }
inline float __uint_as_float(uint32_t x) { return emulated_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated_cast<uint32_t>(x); }
inline double __hiloint2double(uint32_t high, uint32_t low) {
  return emulated_cast<double>(static_cast<uint64_t>(high) << 32 | low);
}
using std::max;
using std::min;
