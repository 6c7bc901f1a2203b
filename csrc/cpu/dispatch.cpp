// Cuts a pass into chunks of fixed size, runs them on torch's threads with the best instruction set, and adds the
// chunks' sums in a fixed order. So any number of threads gives the same bits.
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

constexpr int64_t kChunk = 4096, kPixelChunk = 256;
constexpr int64_t kShortEvent = 512;  // up to this length a kernel sums events by itself
// The least number of chunks per thread. A streaming pass handles several elements in the time of one normal.
constexpr int64_t kStreamingGrain = 8, kNoiseGrain = 2;
constexpr int64_t kMostSlabs = 16;

const Kernels& kernels() { return FASTVAE_BEST(kernels); }

DType dtype_of(const Sums& sums) { return sums.float64 ? DType::float64 : DType::float32; }

void write(void* data, DType dtype, int64_t i, double x) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[i] = x;
      return;
    case DType::bfloat16:
      static_cast<c10::BFloat16*>(data)[i] = static_cast<float>(x);
      return;
    case DType::float16:
      static_cast<c10::Half*>(data)[i] = static_cast<float>(x);
      return;
    default:
      static_cast<float*>(data)[i] = static_cast<float>(x);
  }
}

double value_of(const Number& number, int64_t i = 0) {
  if (number.data == nullptr) return 1;
  switch (number.dtype) {
    case DType::float64:
      return static_cast<const double*>(number.data)[i];
    case DType::bfloat16:
      return static_cast<const c10::BFloat16*>(number.data)[i];
    case DType::float16:
      return static_cast<const c10::Half*>(number.data)[i];
    default:
      return static_cast<const float*>(number.data)[i];
  }
}

void put(const Sums& sums, int64_t i, double sum) {
  write(sums.data, dtype_of(sums), i, sum / sums.divisor / value_of(sums.divisor_at));
}

int64_t chunks_of(int64_t elements, int64_t chunk = kChunk) { return (elements + chunk - 1) / chunk; }

// Calls run(begin, end, sum) for each chunk and adds the sums up. No chunk belongs to two sums.
template <class Run>
void sum_in_chunks(const Sums& sums, int64_t numel, int64_t chunk, int64_t grain, Run run) {
  if (numel == 0) {
    for (int64_t i = 0; sums.data != nullptr && i < sums.count; ++i) put(sums, i, 0);
    return;
  }
  const int64_t length = sums.event > 0 ? sums.event : numel;  // elements of one sum
  const int64_t count = numel / length, chunks = chunks_of(length, chunk);
  if (count * chunks == 1) {
    double sum = 0;
    run(0, numel, &sum);
    if (sums.data != nullptr) put(sums, 0, sum);
    return;
  }
  std::vector<double> partial(count * chunks);
  at::parallel_for(0, count * chunks, grain, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t start = c / chunks * length, begin = start + c % chunks * chunk;
      run(begin, std::min(begin + chunk, start + length), &partial[c]);
    }
  });
  if (sums.data == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[i * chunks + c];
    put(sums, i, sum);
  }
}

// Writes a folded result, whose sums start at folds[first].
void put_folded(const View& view, const PassArgs& args, bool is_value, const std::vector<double>& folds,
                int64_t first) {
  // If a gradient may have been kept, it is rounded before it is multiplied by the upstream gradient.
  const double upstream = args.may_be_kept && !is_value && args.upstream.data != nullptr
                              ? value_of({args.upstream.data, args.upstream.dtype})
                              : 1;
  const double divisor = is_value ? args.sums.divisor * value_of(args.sums.divisor_at) : 1;
  for (int64_t i = 0; i < folded_size(view); ++i) {
    write(view.data, view.dtype, i, folds[first + i] / divisor);
    if (upstream != 1) write(view.data, view.dtype, i, value_of({view.data, view.dtype}, i) * upstream);
  }
}

// A pass with folded results. A slab is a range of chunks; one thread adds up its sums in a fixed order. There are few
// slabs, since each has a copy of the results.
void run_folded(const PassArgs& args, int64_t folded, int64_t grain) {
  const int64_t chunks = chunks_of(args.numel);
  const int64_t slabs = std::max<int64_t>(1, std::min({chunks, kMostSlabs, args.numel / (2 * folded)}));
  std::vector<double> folds(slabs * folded), sums(chunks);
  at::parallel_for(
      0, slabs, std::max<int64_t>(1, grain * slabs / std::max<int64_t>(chunks, 1)), [&](int64_t from, int64_t to) {
        for (int64_t s = from; s < to; ++s) {
          for (int64_t c = s * chunks / slabs; c < (s + 1) * chunks / slabs; ++c) {
            kernels().pass(args, 0, c * kChunk, std::min((c + 1) * kChunk, args.numel), &sums[c], &folds[s * folded]);
          }
        }
      });
  if (args.sums.data != nullptr) {
    double sum = 0;
    for (const double one : sums) sum += one;
    put(args.sums, 0, sum);
  }
  // Slab by slab. The sums of one element may all lie in the same set of the cache.
  for (int64_t s = 1; s < slabs; ++s)
    for (int64_t i = 0; i < folded; ++i) folds[i] += folds[s * folded + i];
  int64_t first = 0;
  for (const View& d : args.d) {
    put_folded(d, args, false, folds, first);
    first += folded_size(d);
  }
  put_folded(args.value, args, true, folds, first);
}

}  // namespace

void pass(const PassArgs& given) {
  PassArgs args = given;
  const Sums& sums = args.sums;
  args.scale *= value_of(args.scale_at) / value_of(sums.divisor_at);
  const bool draws = (args.z.data != nullptr || args.dz.data != nullptr) && args.eps.data == nullptr;
  const int64_t grain = draws ? kNoiseGrain : kStreamingGrain, numel = args.numel;
  int64_t folded = folded_size(args.value);
  for (const View& d : args.d) folded += folded_size(d);
  if (folded > 0) return run_folded(args, folded, grain);
  if (sums.event > 0 && sums.event <= kShortEvent) {
    const int64_t events = numel / sums.event,
                  per_chunk = std::max<int64_t>(1, std::min<int64_t>(kShortEvent, kChunk / sums.event));
    at::parallel_for(0, (events + per_chunk - 1) / per_chunk, grain, [&](int64_t from, int64_t to) {
      double local[kShortEvent];
      for (int64_t first = from * per_chunk; first < std::min(to * per_chunk, events); first += per_chunk) {
        const int64_t last = std::min(first + per_chunk, events);
        kernels().pass(args, sums.event, first * sums.event, last * sums.event, local, nullptr);
        for (int64_t e = first; e < last; ++e) put(sums, e, local[e - first]);
      }
    });
    return;
  }
  sum_in_chunks(sums, numel, kChunk, grain,
                [&](int64_t begin, int64_t end, double* sum) { kernels().pass(args, 0, begin, end, sum, nullptr); });
}

void logistic_mixture(const MixtureArgs& given) {
  MixtureArgs args = given;
  args.scale /= value_of(args.sums.divisor_at);
  sum_in_chunks(args.sums, args.numel, kPixelChunk, 1,
                [&](int64_t begin, int64_t end, double* sum) { kernels().logistic_mixture(args, begin, end, sum); });
}

void normal(const NormalArgs& args, int64_t numel) {
  at::parallel_for(0, (numel + kChunk - 1) / kChunk, kNoiseGrain, [&](int64_t from, int64_t to) {
    kernels().normal(args, from * kChunk, std::min(to * kChunk, numel));
  });
}

void objective(const PassArgs& recon, const PassArgs& kl, const Combination& combination) {
  pass(recon);
  pass(kl);
  if (combination.loss == nullptr) return;
  const DType dtype = combination.float64 ? DType::float64 : DType::float32;
  const double beta = combination.beta * value_of(combination.weight);
  for (int64_t i = 0; i < recon.sums.count; ++i) {
    write(combination.loss, dtype, i,
          value_of({recon.sums.data, dtype_of(recon.sums)}, i) + beta * value_of({kl.sums.data, dtype_of(kl.sums)}, i));
  }
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

InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const std::string name = at::get_cpu_capability();  // obeys ATEN_CPU_CAPABILITY
    return name == "AVX512" ? InstructionSet::avx512 : name == "AVX2" ? InstructionSet::avx2 : InstructionSet::baseline;
  }();
  return chosen;
}

const char* capability() {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(instruction_set())];
}

}  // namespace fastvae::cpu
