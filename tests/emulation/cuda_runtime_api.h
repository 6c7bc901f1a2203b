// CUDA on the CPU, as far as csrc/cuda needs it, to run the kernels without a GPU. One block runs after the other, and
// its threads are fibers. Tests find wrong reads and writes, wrong sums and missing barriers. They do not find races
// between blocks, and say nothing about speed or the device's own arithmetic.
//
// FASTVAE_EMULATED_MULTIPROCESSORS (7): how many the device has. They are few, so that a block takes several items.
// FASTVAE_EMULATED_ORDER=reversed: the last block runs first.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Static, since one block runs at a time. In a separate section, which is filled with 0xff before each block.
#define __shared__ __attribute__((section("fastvae_shared"))) static

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMultiProcessorCount };
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) uint4 {  // the CPU, too, stops at a pack that is not aligned
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};

namespace emulation {

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

struct Index {
  unsigned x = 0;
};
inline Index thread_index, block_index, grid_size;

// Where threads wait for each other.
struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  bool done = false;
  const Barrier* waits_for = nullptr;  // until it has another generation
  int64_t generation = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<double> shuffled;
inline std::mt19937 order;
inline cudaStream_t stream = nullptr;      // the current one, while a guard is in place
inline std::vector<std::string> launches;  // the last ones, for tests

inline void enter() {
  body();
  Fiber& fiber = fibers[thread_index.x];
  fiber.done = true;
  swapcontext(&fiber.context, &scheduler);
}

inline void wait(Barrier& barrier, int threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = fibers[thread_index.x];
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  swapcontext(&fiber.context, &scheduler);
}

// Runs the block's warps in random order, each until all its threads wait for other warps or are done. So a warp runs
// as far ahead of the others as barriers allow.
inline void run_block(int threads) {
  block_barrier = {};
  warp_barriers.assign(threads / 32, {});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.waits_for = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> warps(threads / 32);
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = static_cast<int>(w);
  for (int left = threads; left > 0;) {
    std::shuffle(warps.begin(), warps.end(), order);
    bool moved = false;
    for (const int warp : warps) {
      for (bool again = true; again;) {
        again = false;
        for (int t = 32 * warp; t < 32 * warp + 32; ++t) {
          Fiber& fiber = fibers[t];
          if (fiber.done || (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation)) continue;
          fiber.waits_for = nullptr;
          thread_index.x = t;
          swapcontext(&scheduler, &fiber.context);
          left -= fiber.done;
          again = moved = true;
        }
      }
    }
    if (!moved) fail("the threads of a block wait for each other");
  }
}

extern "C" char __start_fastvae_shared[], __stop_fastvae_shared[];

inline const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 blocks, dim3 threads, void** arguments, size_t,
                             cudaStream_t stream) {
  if (blocks.x == 0 || threads.x % 32 != 0) return cudaErrorInvalidValue;
  if (stream == nullptr || stream != emulation::stream) emulation::fail("a launch on another stream or device");
  if (emulation::launches.size() == 100) emulation::launches.clear();
  emulation::launches.push_back(__PRETTY_FUNCTION__ + (" " + std::to_string(blocks.x)));
  static const bool reversed = std::string(emulation::setting("FASTVAE_EMULATED_ORDER", "")) == "reversed";
  emulation::fibers.resize(threads.x);
  emulation::shuffled.resize(threads.x);
  emulation::grid_size.x = blocks.x;
  emulation::body = [&] { kernel(*static_cast<const Params*>(arguments[0])); };
  for (unsigned b = 0; b < blocks.x; ++b) {
    emulation::block_index.x = reversed ? blocks.x - 1 - b : b;
    std::memset(emulation::__start_fastvae_shared, 0xff,
                emulation::__stop_fastvae_shared - emulation::__start_fastvae_shared);
    emulation::run_block(static_cast<int>(threads.x));
  }
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = std::atoi(emulation::setting("FASTVAE_EMULATED_MULTIPROCESSORS", "7"));
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, const void*, int, size_t) {
  *value = 2;
  return cudaSuccess;
}

inline void __syncthreads() { emulation::wait(emulation::block_barrier, static_cast<int>(emulation::fibers.size())); }
inline double __shfl_xor_sync(uint32_t threads, double x, int mask) {
  if (threads != 0xffffffffu) emulation::fail("a shuffle without some of the warp's threads");
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
template <class T>
void __stwb(T* to, T x) {
  *to = x;
}
inline float __uint_as_float(uint32_t x) { return emulated_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated_cast<uint32_t>(x); }
inline double __hiloint2double(uint32_t high, uint32_t low) {
  return emulated_cast<double>(static_cast<uint64_t>(high) << 32 | low);
}
using std::max;
using std::min;
