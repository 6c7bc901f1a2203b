#include "device.h"

#include <ATen/ops/empty.h>

#include "../cpu/kernels.h"
#include "../pairwise/kernels.h"

#if defined(FASTVAE_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#endif

namespace fastvae {
namespace {

#if defined(FASTVAE_CUDA)
// Calls launch(cuda::Launch) on the tensor's device and the current stream, with memory for `partials` sums.
template <class F>
void on_cuda(const Tensor& on, int64_t partials, F launch) {
  const c10::cuda::CUDAGuard guard(on.device());
  Tensor memory;
  if (partials > 0) memory = at::empty({partials}, on.options().dtype(at::kDouble));
  C10_CUDA_CHECK(launch(cuda::Launch{c10::cuda::getCurrentCUDAStream(), guard.current_device().index(),
                                     partials > 0 ? memory.mutable_data_ptr<double>() : nullptr}));
}

#define FASTVAE_ON_CUDA(on, partials, call)                                        \
  if ((on).is_cuda()) {                                                            \
    on_cuda(on, partials, [&](const cuda::Launch& launch) { return cuda::call; }); \
    return;                                                                        \
  }
#else
#define FASTVAE_ON_CUDA(on, partials, call)  // check_tensor has refused CUDA tensors
#endif

}  // namespace

void run_pass(const Tensor& on, const PassArgs& args) {
  if (on.is_meta()) return;
  FASTVAE_ON_CUDA(on, cuda::partials(args), pass(args, launch))
  cpu::pass(args);
}

void run_objective(const Tensor& on, const PassArgs& recon, const PassArgs& kl, const Combination& combination) {
  if (on.is_meta()) return;
  FASTVAE_ON_CUDA(on, cuda::partials(recon, kl), objective(recon, kl, combination, launch))
  cpu::objective(recon, kl, combination);
}

void run_normal(const Tensor& on, const NormalArgs& args, int64_t numel) {
  if (on.is_meta()) return;
  FASTVAE_ON_CUDA(on, 0, normal(args, numel, launch))
  cpu::normal(args, numel);
}

void run_scale(const Tensor& on, const ScaleArgs& args) {
  if (on.is_meta()) return;
  FASTVAE_ON_CUDA(on, 0, scale(args, launch))
  cpu::scale(args);
}

void run_logistic_mixture(const Tensor& on, const MixtureArgs& args) {
  if (on.is_meta()) return;
  FASTVAE_ON_CUDA(on, cuda::partials(args), logistic_mixture(args, launch))
  cpu::logistic_mixture(args);
}

void run_pairwise(const Tensor& on, const PairwiseArgs& args, bool backward) {
  FASTVAE_ON_CUDA(on, cuda::partials(args, backward), pairwise(args, backward, launch))
  if (backward) {
    cpu::pairwise_backward(args);
  } else {
    cpu::pairwise_forward(args);
  }
}

void run_multivariate(const Tensor& on, const MultivariateArgs& args, bool backward) {
  FASTVAE_ON_CUDA(on, cuda::partials(args, backward), multivariate(args, backward, launch))
  cpu::multivariate(args, backward);
}

}  // namespace fastvae
