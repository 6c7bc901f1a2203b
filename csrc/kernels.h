// What the ops ask of the kernels, on either device: no torch type, so that the kernels compile in seconds and with any
// compiler. All pointers are to memory of the device that runs.
#pragma once

#include "math/config.h"

namespace fastvae {

enum class DType : int { float32, float64, bfloat16, float16 };
enum class Likelihood : int { mse, gaussian };
enum class Prior : int { none, standard, given };

constexpr int kMaxDims = 16;

// A tensor's elements in the logical (row-major) order that all operands of a kernel share. Dimensions that lie behind
// one another in memory are merged: a contiguous tensor has one dimension of stride 1, half a chunk(2, 1) has two.
struct View {
  void* data = nullptr;  // nullptr: the kernel does without this operand
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements; 0 where expanded
};

// A 0-dim tensor; absent it is 1.
struct Number {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

// Which noise: its seed and offset, by value or (on CUDA, where a graph's replays change them, and for a backward pass)
// from the device.
struct Noise {
  uint64_t seed = 0, offset = 0;
  const int64_t *seed_at = nullptr, *offset_at = nullptr;  // if there: instead of `seed`, and added to `offset`
  int64_t* keep = nullptr;                                 // CUDA: where to write both for the backward pass
};
FASTVAE_INLINE uint64_t seed_of(const Noise& noise) {
  return noise.seed_at == nullptr ? noise.seed : static_cast<uint64_t>(*noise.seed_at);
}
FASTVAE_INLINE uint64_t offset_of(const Noise& noise) {
  return noise.offset + (noise.offset_at == nullptr ? 0 : static_cast<uint64_t>(*noise.offset_at));
}

// The value of a loss over its elements, its gradients, or both in one pass.
struct LossArgs {
  double scale = 1;          // d(loss) / d(element's value): 1 / B for batchmean; times
  Number weight;             // beta, if it is a tensor
  View upstream;             // gradient of the loss; absent means 1
  View value;                // the elements' values, if they are wanted one by one
  bool may_be_kept = false;  // such gradients may have been made in the forward pass
  bool float64 = false;      // arithmetic in double
};

struct ReconstructionArgs : LossArgs {
  Likelihood likelihood = Likelihood::mse;
  View recon_x, x;
  View d_recon_x, d_x;
};

// The latents: a sample (if z or dz is there), the KL divergence (if there is a prior), or both.
struct LatentArgs : LossArgs {
  Prior prior = Prior::none;
  View mu, logvar, mu_p, logvar_p;
  View eps;     // given noise, or
  Noise noise;  // the noise to make
  View z;       // forward
  View dz;      // backward
  View d_mu, d_logvar, d_mu_p, d_logvar_p, d_eps;
};

struct NormalArgs {
  View out;
  Noise noise;
  uint64_t start = 0;  // index of the first element
};

// Tensors to be multiplied in place by one number.
struct ScaleArgs {
  static constexpr int kMost = 8;
  View tensor[kMost];
  int64_t numel[kMost];
  int count = 0;
  Number factor;
};

// Where a loss goes: the sum over all elements, or one for each sample's `event` elements, over `divisor`.
struct Sums {
  void* data = nullptr;  // nullptr: not wanted
  bool float64 = false;  // else float32
  int64_t count = 1;     // of sums: 1, or one for each sample
  int64_t event = 0;     // elements of a sample; 0: one sum of all
  double divisor = 1;
};

// loss = recon + beta * kl, for each of the sums of a reconstruction and of a KL divergence.
struct Combination {
  void* loss = nullptr;  // nullptr: not wanted
  bool float64 = false;
  double beta = 1;  // times
  Number weight;    // beta, if it is a tensor
};

}  // namespace fastvae
