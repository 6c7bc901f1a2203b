// Divides the pairs among torch's threads, in parts that depend only on the sizes, and adds up the parts' gradients in
// a fixed order. So any number of threads gives the same bits.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "../cpu/kernels.h"
#include "kernels.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kMostSlabs = 8;    // of rows, or of components: each slab has a copy of the gradients
constexpr int64_t kMostParts = 16;   // roughly
constexpr int64_t kGrain = 1 << 14;  // so many pairs times dimensions are worth a thread

const Pairwise& kernels() { return FASTVAE_BEST(pairwise); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(size, 1)]);
}

// Calls work(part) for each part. `size`: pairs times dimensions of a part.
template <class Work>
void for_each_part(int64_t parts, int64_t size, Work work) {
  at::parallel_for(0, parts, std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)), [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) work(part);
  });
}

// The components in the layout of the kernels.
template <class T>
class Packed {
 public:
  explicit Packed(const PairwiseArgs& args)
      : blocks(ceil_div(args.components, kPairComponents)),
        components_(array<T>(blocks * args.dims * 3 * kPairComponents)),
        joint_(array<T>(blocks * kPairComponents)),
        bound_(array<T>(args.dims)) {
    scratch.components = components_.get();
    scratch.joint = joint_.get();
    scratch.bound = bound_.get();
    for_each_part(blocks, args.dims * kPairComponents, [&](int64_t block) { kernels().pack(args, scratch, block); });
    if (args.marginals) kernels().bound(args, scratch);
  }
  const int64_t blocks;
  PairwiseScratch scratch;

 private:
  std::unique_ptr<T[]> components_, joint_, bound_;
};

template <class T>
void forward_of(const PairwiseArgs& args) {
  Packed<T> packed(args);
  const auto terms = array<double>(args.decompose ? 3 * args.rows : 0);
  packed.scratch.terms = terms.get();
  for_each_part(ceil_div(args.rows, kPairRows), kPairRows * args.components * args.dims,
                [&](int64_t group) { kernels().forward(args, packed.scratch, group); });
  for (int k = 0; k < 3 && args.decompose; ++k) {
    const double* from = terms.get() + k * args.rows;
    T* to = static_cast<T*>(args.terms[k]);
    double sum = 0;
    for (int64_t i = 0; i < args.rows; ++i) {
      sum += from[i];
      if (args.by_row) to[i] = static_cast<T>(from[i]);
    }
    if (!args.by_row) to[0] = static_cast<T>(sum / args.divisor);
  }
}

// A gradient that is summed over slabs: a copy for each slab, or the gradient itself if there is only one slab.
template <class T>
class Parts {
 public:
  Parts(void* to, int64_t size, int64_t slabs, bool wanted = true)
      : to_(static_cast<T*>(to)), size_(wanted ? size : 0), slabs_(slabs) {
    if (slabs > 1 || to == nullptr) own_ = array<T>(size_ * slabs);
  }
  T* part(int64_t slab) { return own_ == nullptr ? to_ : own_.get() + slab * size_; }
  void clear(int64_t slab) { std::fill_n(part(slab), size_, T(0)); }
  void finish() {
    if (own_ == nullptr || to_ == nullptr) return;
    for_each_part(ceil_div(size_, kGrain), kGrain, [&](int64_t chunk) {
      const int64_t end = std::min(size_, (chunk + 1) * kGrain);
      for (int64_t i = chunk * kGrain; i < end; ++i) {
        T sum = own_[i];
        for (int64_t s = 1; s < slabs_; ++s) sum += own_[s * size_ + i];
        to_[i] = sum;
      }
    });
  }

 private:
  T* to_;
  int64_t size_, slabs_;
  std::unique_ptr<T[]> own_;
};

template <class T>
void backward_of(const PairwiseArgs& args) {
  const Packed<T> packed(args);
  const int64_t groups = ceil_div(args.rows, kPairRows), tiles = ceil_div(groups, kPairGroups);
  const int64_t across = std::clamp<int64_t>(tiles, 1, kMostSlabs);
  const int64_t parts = std::clamp<int64_t>(args.rows * args.components * args.dims / kGrain, 1, kMostParts);
  const int64_t down = std::clamp<int64_t>(parts / across, 1, std::clamp<int64_t>(packed.blocks / 2, 1, kMostSlabs));
  const int64_t parameters = args.components * args.dims;
  const bool shared = args.dlog_weight != nullptr && !args.weight_by_row;
  Parts<T> dz(args.dz, args.rows * args.dims, down), dmu(args.dmu, parameters, across),
      dlogvar(args.dlogvar, parameters, across), dlog_weight(args.dlog_weight, args.components, across, shared);
  // A slab's gradients of the parameters. Its parts have different components, so they add to different places.
  for (int64_t s = 0; s < across; ++s) {
    dmu.clear(s);
    dlogvar.clear(s);
    if (shared) dlog_weight.clear(s);
  }
  for_each_part(across * down, args.rows * args.components * args.dims / (across * down), [&](int64_t part) {
    const int64_t row = part / down, column = part % down;
    PairwiseScratch scratch = packed.scratch;
    scratch.dz = dz.part(column);
    scratch.dmu = dmu.part(row);
    scratch.dlogvar = dlogvar.part(row);
    scratch.dlog_weight = shared ? dlog_weight.part(row) : args.dlog_weight;
    const auto group = [&](int64_t r) { return std::min(r * tiles / across * kPairGroups, groups); };
    kernels().backward(args, scratch, group(row), group(row + 1), column * packed.blocks / down,
                       (column + 1) * packed.blocks / down);
  });
  dz.finish();
  dmu.finish();
  dlogvar.finish();
  if (shared) dlog_weight.finish();
}

}  // namespace

void pairwise_forward(const PairwiseArgs& args) {
  return args.float64 ? forward_of<double>(args) : forward_of<float>(args);
}
void pairwise_backward(const PairwiseArgs& args) {
  return args.float64 ? backward_of<double>(args) : backward_of<float>(args);
}

}  // namespace fastvae::cpu
