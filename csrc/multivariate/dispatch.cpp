// Divides the rows of mu among torch's threads. A row's results do not depend on the other rows, and the KLs are added
// in order, so any number of threads gives the same bits.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "../cpu/kernels.h"
#include "multivariate.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // so many numbers are worth a thread

const Multivariate& kernels() { return FASTVAE_BEST(multivariate); }

template <class T>
void add_up(const MultivariateArgs& args, const double* kl) {
  for (int64_t i = 0; i < args.kl.count; ++i) {
    const int64_t rows = args.rows / args.kl.count;
    double sum = 0;
    for (int64_t b = i * rows; b < (i + 1) * rows; ++b) sum += kl[b];
    static_cast<T*>(args.kl.data)[i] = static_cast<T>(sum / args.kl.divisor);
  }
}

}  // namespace

void multivariate(const MultivariateArgs& args, bool backward) {
  const std::unique_ptr<double[]> kl(backward ? nullptr : new double[args.rows]);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(args.size(), 1));
  at::parallel_for(0, args.rows, grain, [&](int64_t first, int64_t last) {
    if (backward) return kernels().backward(args, first, last);
    kernels().forward(args, kl.get(), first, last);
  });
  if (!backward) args.float64 ? add_up<double>(args, kl.get()) : add_up<float>(args, kl.get());
}

}  // namespace fastvae::cpu
