// The CPU kernels. Each works on a range of logical elements and may be called for different ranges from several
// threads. dispatch.cpp chooses the ranges, so that results do not depend on the number of threads.
#pragma once

#include "../kernels.h"

namespace fastvae::cpu {

// `sums` takes the sum over [begin, end) or, if event > 0, one sum for each `event` elements. The sums of folded
// results are added to `folds`: those of d[0], d[1], ..., then those of `value`.
struct Kernels {
  void (*pass)(const PassArgs&, int64_t event, int64_t begin, int64_t end, double* sums, double* folds);
  void (*normal)(const NormalArgs&, int64_t begin, int64_t end);
  void (*scale)(const View& tensor, double factor, int64_t begin, int64_t end);
  void (*logistic_mixture)(const MixtureArgs&, int64_t begin, int64_t end, double* sum);  // pixels
};

// kernels.cpp is compiled once for each of these.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// dispatch.cpp: the same over all elements [0, numel), on torch's threads and the best instruction set.
void pass(const PassArgs&);
void objective(const PassArgs& recon, const PassArgs& kl, const Combination&);
void normal(const NormalArgs&, int64_t numel);
void scale(const ScaleArgs&);
void logistic_mixture(const MixtureArgs&);

enum class InstructionSet : int { baseline, avx2, avx512 };
InstructionSet instruction_set();  // the best one here
const char* capability();          // its name

// Of the copies of some kernels, the one for that instruction set.
#if defined(FASTVAE_X86_KERNELS)
#define FASTVAE_BEST(kernels)                                               \
  (cpu::instruction_set() == cpu::InstructionSet::avx512 ? kernels##_avx512 \
   : cpu::instruction_set() == cpu::InstructionSet::avx2 ? kernels##_avx2   \
                                                         : kernels##_baseline)
#else
#define FASTVAE_BEST(kernels) kernels##_baseline
#endif

}  // namespace fastvae::cpu
