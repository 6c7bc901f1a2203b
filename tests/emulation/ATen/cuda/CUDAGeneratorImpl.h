// A replacement of CUDA's generator by the CPU's.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>

namespace at {

struct CUDAGeneratorImpl : CPUGeneratorImpl {
  // The seed is the generator's next 64 bits. If it is odd, the state is that of a captured graph: the seed and a part
  // of the offset are in memory, and the kernel must add up the parts of the offset. tests/accuracy.py knows the
  // offsets.
  PhiloxCudaState philox_cuda_state(uint64_t) {
    static thread_local int64_t seed, offset;
    const uint64_t drawn = random64();
    if (drawn % 2 == 0) return {drawn, 0};
    seed = static_cast<int64_t>(drawn);
    offset = 40;
    return {&seed, &offset, 8};
  }
};

namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator(DeviceIndex) { return at::detail::getDefaultCPUGenerator(); }
}  // namespace cuda::detail

}  // namespace at
