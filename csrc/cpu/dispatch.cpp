// Cuts a pass into chunks of fixed size, runs them on torch's threads with the best instruction set, and adds the
// chunks' sums in a fixed order: the same bits for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kShortEvent = 512;  // up to this length a kernel sums events by itself
// Chunks that are worth a thread: a streaming pass moves several elements in the time that one normal takes.
constexpr int64_t kStreamingGrain = 8, kNoiseGrain = 2;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(FASTVAE_X86_KERNELS)
    const std::string name = at::get_cpu_capability();  // obeys ATEN_CPU_CAPABILITY
    if (name == "AVX512") return kernels_avx512;
    if (name == "AVX2") return kernels_avx2;
#endif
    return kernels_baseline;
  }();
  return chosen;
}

void write(void* data, bool float64, int64_t i, double x) {
  if (float64) {
    static_cast<double*>(data)[i] = x;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(x);
  }
}
double read(const void* data, bool float64, int64_t i) {
  return float64 ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
}
void put(const Sums& sums, int64_t i, double sum) { write(sums.data, sums.float64, i, sum / sums.divisor); }

double value_of(const Number& number) {
  if (number.data == nullptr) return 1;
  switch (number.dtype) {
    case DType::float64:
      return *static_cast<const double*>(number.data);
    case DType::bfloat16:
      return *static_cast<const c10::BFloat16*>(number.data);
    case DType::float16:
      return *static_cast<const c10::Half*>(number.data);
    default:
      return *static_cast<const float*>(number.data);
  }
}

// Calls kernel(args, event, begin, end, sums) for all of [0, numel).
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, int64_t, double*), Args args, int64_t numel, const Sums& sums,
         int64_t grain) {
  if (numel == 0) {
    for (int64_t i = 0; sums.data != nullptr && i < sums.count; ++i) put(sums, i, 0);
    return;
  }
  args.scale *= value_of(args.weight);
  const int64_t length = sums.event > 0 ? sums.event : numel;  // what one sum runs over
  if (sums.event > 0 && sums.event <= kShortEvent) {
    const int64_t events = numel / sums.event,
                  per_chunk = std::max<int64_t>(1, std::min<int64_t>(kShortEvent, kChunk / sums.event));
    at::parallel_for(0, (events + per_chunk - 1) / per_chunk, grain, [&](int64_t from, int64_t to) {
      double local[kShortEvent];
      for (int64_t first = from * per_chunk; first < std::min(to * per_chunk, events); first += per_chunk) {
        const int64_t last = std::min(first + per_chunk, events);
        kernel(args, sums.event, first * sums.event, last * sums.event, local);
        for (int64_t e = first; e < last; ++e) put(sums, e, local[e - first]);
      }
    });
    return;
  }
  const int64_t count = numel / length, chunks = (length + kChunk - 1) / kChunk;
  if (count * chunks == 1) {
    double sum = 0;
    kernel(args, 0, 0, numel, &sum);
    if (sums.data != nullptr) put(sums, 0, sum);
    return;
  }
  std::vector<double> partial(count * chunks);
  at::parallel_for(0, count * chunks, grain, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t start = c / chunks * length, begin = start + c % chunks * kChunk;
      kernel(args, 0, begin, std::min(begin + kChunk, start + length), &partial[c]);
    }
  });
  if (sums.data == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[i * chunks + c];
    put(sums, i, sum);
  }
}

}  // namespace

void reconstruction(const ReconstructionArgs& args, int64_t numel, const Sums& sums) {
  run(kernels().reconstruction, args, numel, sums, kStreamingGrain);
}

void latent(const LatentArgs& args, int64_t numel, const Sums& sums) {
  const bool draws = (args.z.data != nullptr || args.dz.data != nullptr) && args.eps.data == nullptr;
  run(kernels().latent, args, numel, sums, draws ? kNoiseGrain : kStreamingGrain);
}

void normal(const NormalArgs& args, int64_t numel) {
  at::parallel_for(0, (numel + kChunk - 1) / kChunk, kNoiseGrain, [&](int64_t from, int64_t to) {
    kernels().normal(args, from * kChunk, std::min(to * kChunk, numel));
  });
}

void objective(const ReconstructionArgs& recon_args, int64_t recon_numel, const Sums& recon, const LatentArgs& kl_args,
               int64_t kl_numel, const Sums& kl, const Combination& combination) {
  reconstruction(recon_args, recon_numel, recon);
  latent(kl_args, kl_numel, kl);
  if (combination.loss == nullptr) return;
  const double beta = combination.beta * value_of(combination.weight);
  for (int64_t i = 0; i < recon.count; ++i)
    write(combination.loss, combination.float64, i,
          read(recon.data, recon.float64, i) + beta * read(kl.data, kl.float64, i));
}

void scale(const ScaleArgs& args) {
  const double factor = value_of(args.factor);
  if (factor == 1) return;
  for (int t = 0; t < args.count; ++t) {
    at::parallel_for(0, (args.numel[t] + kChunk - 1) / kChunk, kStreamingGrain, [&](int64_t from, int64_t to) {
      kernels().scale(args.tensor[t], factor, from * kChunk, std::min(to * kChunk, args.numel[t]));
    });
  }
}

const char* capability() {
  [[maybe_unused]] const Kernels* chosen = &kernels();
#if defined(FASTVAE_X86_KERNELS)
  if (chosen == &kernels_avx512) return "avx512";
  if (chosen == &kernels_avx2) return "avx2";
#endif
  return "baseline";
}

}  // namespace fastvae::cpu
