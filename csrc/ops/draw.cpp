// New noise from torch's generators.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>

#include "device.h"

#if defined(FASTVAE_CUDA)
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace fastvae {

#if defined(FASTVAE_CUDA)
namespace {

Noise cuda_noise(const Tensor& like, const std::optional<at::Generator>& generator, const Tensor& state) {
  auto* cuda = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(like.device().index()));
  // The smallest step that CUDA's generator allows; our noise needs one offset for a whole draw.
  constexpr uint64_t kStep = 4;
  // Torch's own kernels use the same seed as the key, and a thread's number in the place of our offset. The top bit
  // separates the counters: without it a draw would repeat the random words of torch.randn's thread number `offset`.
  constexpr uint64_t kOurs = uint64_t(1) << 63;
  at::PhiloxCudaState philox;
  {
    std::lock_guard<std::mutex> lock(cuda->mutex_);
    philox = cuda->philox_cuda_state(kStep);
  }
  Noise noise;
  if (philox.captured_) {
    noise.seed_at = philox.seed_.ptr;
    noise.offset_at = philox.offset_.ptr;
    noise.offset = kOurs + philox.offset_intragraph_;
  } else {
    noise.seed = philox.seed_.val;
    noise.offset = kOurs + philox.offset_.val;
  }
  noise.keep = state.mutable_data_ptr<int64_t>();
  return noise;
}

}  // namespace
#endif

Draw draw(const Tensor& like, const std::optional<at::Generator>& generator) {
  Draw draw;
  draw.state = at::empty({2}, like.options().dtype(at::kLong));
  if (like.is_meta()) return draw;
#if defined(FASTVAE_CUDA)
  if (like.is_cuda()) {
    draw.noise = cuda_noise(like, generator, draw.state);
    return draw;
  }
#endif
  auto* cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  std::lock_guard<std::mutex> lock(cpu->mutex_);
  int64_t* seed_and_offset = draw.state.mutable_data_ptr<int64_t>();
  seed_and_offset[0] = static_cast<int64_t>(cpu->random64());
  seed_and_offset[1] = 0;
  draw.noise = remembered(draw.state);
  return draw;
}

Noise remembered(const Tensor& state) {
  Noise noise;
  if (state.is_meta()) return noise;
  noise.seed_at = state.const_data_ptr<int64_t>();
  noise.offset_at = noise.seed_at + 1;
  return noise;
}

}  // namespace fastvae
