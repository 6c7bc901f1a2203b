// The CPU kernels as the ops call them. Each works on a range of logical elements and may be called for different
// ranges from several threads; dispatch.cpp cuts the ranges, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../view.h"

namespace fastvae::cpu {

enum class Likelihood : int { mse, gaussian };
enum class Prior : int { none, standard, given };

// The value of a loss over its elements, its gradients, or both in one pass.
struct LossArgs {
  double scale = 1;          // d(loss) / d(element's value): 1 / B for batchmean, times beta
  View upstream;             // gradient of the loss; absent means 1
  View value;                // the elements' values, if they are wanted one by one
  int64_t event = 0;         // sum each run of so many elements by itself; 0: sum the whole range
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
  View eps;  // given noise; absent: noise is drawn from (seed, offset)
  uint64_t seed = 0, offset = 0;
  View z;   // forward
  View dz;  // backward
  View d_mu, d_logvar, d_mu_p, d_logvar_p, d_eps;
};

struct NormalArgs {
  View out;
  uint64_t seed = 0, offset = 0, start = 0;
};

struct ScaleArgs {
  View tensor;  // multiplied in place
  View upstream;
  bool float64 = false;
};

// `sums` takes the sum over [begin, end), or one for each event in it.
struct Kernels {
  void (*reconstruction)(const ReconstructionArgs&, int64_t begin, int64_t end, double* sums);
  void (*latent)(const LatentArgs&, int64_t begin, int64_t end, double* sums);
  void (*normal)(const NormalArgs&, int64_t begin, int64_t end);
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
};

// kernels.cpp is compiled once for each of these.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// Where a loss goes, divided by `divisor`: its total (event == 0), or the sum of each `event` elements.
struct Sums {
  void* data = nullptr;  // nullptr: not wanted
  bool float64 = false;  // else float32
  int64_t event = 0;
  double divisor = 1;
};

// dispatch.cpp: the same over all elements [0, numel), on torch's threads and the best instruction set.
void reconstruction(const ReconstructionArgs&, int64_t numel, const Sums&);
void latent(const LatentArgs&, int64_t numel, const Sums&);
void normal(const NormalArgs&, int64_t numel);
void scale(const ScaleArgs&, int64_t numel);
const char* capability();  // the instruction set in use

}  // namespace fastvae::cpu
