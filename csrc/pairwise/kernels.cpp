// Each lane works on a row; the components follow one after the other. Compiled once for each instruction set;
// FASTVAE_ISA and FASTVAE_PAIRWISE name this copy.
#include "kernels.h"

#include <algorithm>
#include <memory>
#include <new>

#include "../cpu/transpose.h"
#include "pair.h"

FASTVAE_NAMESPACE_BEGIN
namespace {

using cpu::kPairComponents;
using cpu::PairwiseScratch;
constexpr int kMostRows = kPairRows * cpu::kPairGroups;

// Memory that is aligned to whole vectors, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size > 0 ? static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64))) : nullptr) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// If a marginal's sum is below this, its terms have lost their digits. It is computed again, over the largest term.
template <class T>
constexpr T kTooSmall = sizeof(T) == 4 ? T(1e-28) : T(1e-280);

constexpr int kAtOnce = 4;  // components whose distances are summed at the same time

// The packed components of a block: [L][3][kPairComponents].
template <class T>
struct Block {
  const T* data;
  int64_t first;
  int count, padded;  // components; rounded up to a multiple of kAtOnce

  Block(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t block)
      : data(static_cast<const T*>(scratch.components) + block * args.dims * 3 * kPairComponents),
        first(block * kPairComponents),
        count(static_cast<int>(std::min<int64_t>(kPairComponents, args.components - first))),
        padded((count + kAtOnce - 1) / kAtOnce * kAtOnce) {}
  const T* mu(int64_t d) const { return data + d * 3 * kPairComponents; }
  const T* scale(int64_t d) const { return mu(d) + kPairComponents; }
  const T* constant(int64_t d) const { return mu(d) + 2 * kPairComponents; }
};

// Some rows. z is transposed, so that a vector holds one dimension of several rows. Rows behind the last are zeros.
template <class T>
class Rows {
 public:
  Rows(const PairwiseArgs& args, int64_t first_group, int groups)
      : first(first_group * kPairRows),
        size(groups * kPairRows),
        count(static_cast<int>(std::min<int64_t>(size, args.rows - first))),
        z(args.dims * size),
        args_(args) {
    transpose(static_cast<const T*>(args.z) + first * args.dims, args.dims, static_cast<T*>(z), size, count, args.dims);
    for (int64_t d = 0; d < args.dims && count < size; ++d) std::fill_n(z + d * size + count, size - count, T(0));
    for (int i = 0; i < size; ++i) base[i] = T(0);
    if (args.log_weight == nullptr) {
      for (int i = 0; i < size; ++i) base[i] = static_cast<T>(args.other);
    } else if (args.weight_by_row) {
      for (int i = 0; i < count; ++i) {
        T largest = Constants<T>::kLowest;
        for (int64_t j = 0; j < args.components; ++j) largest = at_least(largest, weight(i, j));
        base[i] = largest;
      }
    }
  }

  // The log-weights of a block's components, minus `base` and minus what their constants include:
  // [kPairComponents][size], or nullptr if all of them are 0.
  const T* weights(const Block<T>& block) const {
    const bool diagonal = args_.log_weight == nullptr && args_.own != args_.other && block.first < first + count &&
                          first < block.first + block.count;
    if (!diagonal && !args_.weight_by_row) return nullptr;
    for (int j = 0; j < kPairComponents; ++j) {
      T* to = weights_ + j * size;
      for (int i = 0; i < size; ++i) to[i] = T(0);
      if (j >= block.count) continue;
      if (args_.weight_by_row) {
        for (int i = 0; i < count; ++i) to[i] = weight(i, block.first + j) - base[i];
      } else if (const int64_t i = block.first + j - first; i >= 0 && i < count) {
        to[i] = static_cast<T>(args_.own - args_.other);
      }
    }
    return weights_;
  }

  // Calls visit(row, component of the block) for the pairs of a row and its own component.
  template <class Visit>
  void for_own(const Block<T>& block, Visit visit) const {
    for (int j = 0; j < block.count; ++j) {
      const int64_t i = block.first + j - first;
      if (i >= 0 && i < count) visit(static_cast<int>(i), j);
    }
  }

  // sum_d u^2 of each row and component of a block, [kPairComponents][size]. Both passes use it, for the same bits.
  void distances(const Block<T>& block, T* to) const {
    using V = Vec<T>;
    for (int i = 0; i < size; i += V::kLanes) {
      for (int j = 0; j < block.padded; j += kAtOnce) {
        V sum[kAtOnce];
        for (V& s : sum) s = V(T(0));
        for (int64_t d = 0; d < args_.dims; ++d) {
          const V x = V::load(z + d * size + i);
          const T *mu = block.mu(d) + j, *scale = block.scale(d) + j;
          FASTVAE_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            const V u = scaled_distance(x, V(mu[k]), V(scale[k]));
            sum[k] = multiply_add(u, u, sum[k]);
          }
        }
        for (int k = 0; k < kAtOnce; ++k) sum[k].store(to + (j + k) * size + i);
      }
    }
  }

  const int64_t first;
  const int size, count;
  Buffer<T> z;
  T base[kMostRows];

 private:
  T weight(int i, int64_t j) const {
    return static_cast<const T*>(args_.log_weight)[(first + i) * args_.components + j];
  }
  const PairwiseArgs& args_;
  alignas(64) mutable T weights_[kPairComponents * kMostRows];
};

// The exponent of a mixture's or a marginal's term. `weights` are those of these lanes, or nullptr.
template <class V, class T>
FASTVAE_INLINE V joint_exponent(V distance, T constant, const T* weights) {
  V x(constant);
  if (weights != nullptr) x = x + V::load(weights);
  return x - distance;
}
template <class V, class T>
FASTVAE_INLINE V marginal_exponent(V u, T constant, const T* weights) {
  V x = log_density(u, V(constant));
  if (weights != nullptr) x = x + V::load(weights);
  return x;
}

template <class T>
void pack_of(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t block_index) {
  using V = Vec<T>;
  const Block<T> block(args, scratch, block_index);
  T* to = const_cast<T*>(block.data);
  double joint[kPairComponents] = {};
  const T* shared = args.weight_by_row ? nullptr : static_cast<const T*>(args.log_weight);
  for (int64_t d = 0; d < args.dims; ++d, to += 3 * kPairComponents) {
    T logvar[kPairComponents] = {}, *constant = to + 2 * kPairComponents;
    for (int j = 0; j < kPairComponents; ++j) {
      const int64_t from = (block.first + j) * args.dims + d;
      to[j] = j < block.count ? static_cast<const T*>(args.mu)[from] : T(0);
      if (j < block.count) logvar[j] = static_cast<const T*>(args.logvar)[from];
    }
    for (int j = 0; j < kPairComponents; j += V::kLanes) {
      alignas(64) T in[V::kLanes] = {}, scales[V::kLanes], constants[V::kLanes];
      std::copy_n(logvar + j, std::min(V::kLanes, kPairComponents - j), in);
      const Component<V> c = component(V::load(in));
      c.scale.store(scales);
      c.constant.store(constants);
      for (int k = 0; k < V::kLanes && j + k < kPairComponents; ++k) {
        to[kPairComponents + j + k] = scales[k];
        constant[j + k] = constants[k];
      }
    }
    for (int j = 0; j < kPairComponents; ++j) {
      joint[j] += static_cast<double>(constant[j]);
      if (shared != nullptr && j < block.count) constant[j] = constant[j] + shared[block.first + j];
      if (j >= block.count) constant[j] = -Constants<T>::kInfinity;
    }
  }
  for (int j = 0; j < kPairComponents; ++j) {
    if (shared != nullptr && j < block.count) joint[j] += static_cast<double>(shared[block.first + j]);
    static_cast<T*>(scratch.joint)[block.first + j] =
        j < block.count ? static_cast<T>(joint[j]) : -Constants<T>::kInfinity;
  }
}

template <class T>
void bound_of(const PairwiseArgs& args, const PairwiseScratch& scratch) {
  const int64_t blocks = (args.components + kPairComponents - 1) / kPairComponents;
  T* bound = static_cast<T*>(scratch.bound);
  for (int64_t d = 0; d < args.dims; ++d) bound[d] = Constants<T>::kLowest;
  for (int64_t b = 0; b < blocks; ++b) {
    const Block<T> block(args, scratch, b);
    for (int64_t d = 0; d < args.dims; ++d)
      for (int j = 0; j < kPairComponents; ++j) bound[d] = at_least(bound[d], block.constant(d)[j]);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const Block<T> block(args, scratch, b);
    for (int64_t d = 0; d < args.dims; ++d)
      for (int j = 0; j < kPairComponents; ++j) const_cast<T*>(block.constant(d))[j] -= bound[d];
  }
}

// What the forward pass keeps for the backward pass, for a group of rows.
template <class T>
struct Stats {
  T *reference, *sum;  // of the mixture
  T* marginal;         // for each dimension: the shift, then the sum

  Stats(const PairwiseArgs& args, int64_t group)
      : reference(static_cast<T*>(args.stats) + group * kPairRows * args.stats_of_a_row()),
        sum(reference + kPairRows),
        marginal(sum + kPairRows) {}
  T* shift_of(int64_t d) const { return marginal + d * 2 * kPairRows; }
  T* sum_of(int64_t d) const { return shift_of(d) + kPairRows; }
};

template <class T>
class Forward {
  using V = Vec<T>;

 public:
  Forward(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t group)
      : args_(args),
        scratch_(scratch),
        blocks_((args.components + kPairComponents - 1) / kPairComponents),
        rows_(args, group, 1),
        stats_(args, group),
        lost_(args.dims * kPairRows) {}

  void run() {
    alignas(64) T distance[kPairComponents * kPairRows], lost[kPairRows], own[kPairRows];
    for (int i = 0; i < kPairRows; ++i) {
      stats_.reference[i] = Constants<T>::kLowest;
      stats_.sum[i] = lost[i] = own[i] = T(0);
    }
    if (args_.marginals) {
      for (int64_t d = 0; d < args_.dims; ++d)
        for (int i = 0; i < kPairRows; ++i)
          stats_.shift_of(d)[i] = stats_.sum_of(d)[i] = lost_[d * kPairRows + i] = T(0);
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      const Block<T> block(args_, scratch_, b);
      const T* weights = rows_.weights(block);
      if (args_.joint) {
        rows_.distances(block, distance);
        const T* constant = static_cast<const T*>(scratch_.joint) + block.first;
        if (args_.decompose)
          rows_.for_own(block, [&](int i, int j) { own[i] = constant[j] - distance[j * kPairRows + i]; });
        add_mixture(block.padded, distance, constant, weights, lost);
      }
      if (args_.marginals) {
        for (int64_t d = 0; d < args_.dims; ++d) add_marginal(block, d, weights);
      }
    }
    for (int i = 0; i < kPairRows; ++i) stats_.sum[i] += lost[i];
    double log_q[kPairRows], log_prod[kPairRows] = {};
    if (args_.joint) {
      finish(stats_.sum, log_q, [&](int i) { return stats_.reference[i]; });
      for (int i = 0; i < rows_.count && args_.log_q != nullptr; ++i)
        static_cast<T*>(args_.log_q)[rows_.first + i] = static_cast<T>(log_q[i]);
    }
    for (int64_t d = 0; d < args_.dims && args_.marginals; ++d) {
      T *sum = stats_.sum_of(d), *shift = stats_.shift_of(d);
      for (int i = 0; i < kPairRows; ++i) sum[i] += lost_[d * kPairRows + i];
      if (std::any_of(sum, sum + kPairRows, [](T s) { return s < kTooSmall<T>; })) add_far_marginal(d);
      double log_q_d[kPairRows];
      const double bound = static_cast<double>(static_cast<const T*>(scratch_.bound)[d]);
      finish(sum, log_q_d, [&](int i) { return bound + static_cast<double>(shift[i]); });
      for (int i = 0; i < rows_.count; ++i) {
        log_prod[i] += log_q_d[i];
        if (args_.log_q_dims != nullptr)
          static_cast<T*>(args_.log_q_dims)[(rows_.first + i) * args_.dims + d] = static_cast<T>(log_q_d[i]);
      }
    }
    for (int i = 0; i < rows_.count && args_.decompose; ++i) {
      double log_p = -0.91893853320467274178 * static_cast<double>(args_.dims);
      for (int64_t d = 0; d < args_.dims; ++d) {
        const double z = static_cast<double>(rows_.z[d * kPairRows + i]);
        log_p -= 0.5 * z * z;
      }
      double* to = scratch_.terms + rows_.first + i;
      to[0] = static_cast<double>(own[i]) - log_q[i];
      to[args_.rows] = log_q[i] - log_prod[i];
      to[2 * args_.rows] = log_prod[i] - log_p;
    }
  }

 private:
  void add_mixture(int count, T* x, const T* constant, const T* weights, T* lost) {
    for (int i = 0; i < kPairRows; i += V::kLanes) {
      const V before = V::load(stats_.reference + i);
      V largest = before;
      for (int j = 0; j < count; ++j) {
        T* at = x + j * kPairRows + i;
        const V exponent =
            joint_exponent(V::load(at), constant[j], weights == nullptr ? nullptr : weights + j * kPairRows + i);
        exponent.store(at);
        largest = at_least(largest, exponent);
      }
      V sum(T(0));
      for (int j = 0; j < count; ++j) sum = sum + exponential_of_log_weight(V::load(x + j * kPairRows + i) - largest);
      Compensated<V> total{V::load(stats_.sum + i), V::load(lost + i)};
      total.scale(exponential_of_log_weight(before - largest));
      total.add(sum);
      total.sum.store(stats_.sum + i);
      total.lost.store(lost + i);
      largest.store(stats_.reference + i);
    }
  }

  // Calls visit(component, u) for the components of a block and the rows from i on.
  template <class Visit>
  FASTVAE_INLINE void for_each(const Block<T>& block, int64_t d, int i, Visit visit) const {
    const V z = V::load(rows_.z + d * kPairRows + i);
    const T *mu = block.mu(d), *scale = block.scale(d);
    for (int j = 0; j < block.padded; ++j) visit(j, scaled_distance(z, V(mu[j]), V(scale[j])));
  }

  void add_marginal(const Block<T>& block, int64_t d, const T* weights) {
    const T* constant = block.constant(d);
    for (int i = 0; i < kPairRows; i += V::kLanes) {
      V sum(T(0));
      if (weights == nullptr) {
        for_each(block, d, i, [&](int j, V u) __attribute__((always_inline)) {
          sum = sum + exponential_of_log_weight(marginal_exponent<V, T>(u, constant[j], nullptr));
        });
      } else {
        for_each(block, d, i, [&](int j, V u) __attribute__((always_inline)) {
          sum = sum + exponential_of_log_weight(marginal_exponent(u, constant[j], weights + j * kPairRows + i));
        });
      }
      T *to = stats_.sum_of(d) + i, *lost = lost_ + d * kPairRows + i;
      Compensated<V> total{V::load(to), V::load(lost)};
      total.add(sum);
      total.sum.store(to);
      total.lost.store(lost);
    }
  }

  // For rows whose z is far from all components: computes the sums again, over their largest terms.
  __attribute__((noinline)) void add_far_marginal(int64_t d) {
    T *total = stats_.sum_of(d), *shift = stats_.shift_of(d);
    alignas(64) T largest[kPairRows], sum[kPairRows];
    for (int i = 0; i < kPairRows; ++i) {
      largest[i] = Constants<T>::kLowest;
      sum[i] = T(0);
    }
    for (const bool last : {false, true}) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const Block<T> block(args_, scratch_, b);
        const T *weights = rows_.weights(block), *constant = block.constant(d);
        for (int i = 0; i < kPairRows; i += V::kLanes) {
          V most = V::load(largest + i), s = V::load(sum + i);
          for_each(block, d, i, [&](int j, V u) {
            const V x = marginal_exponent(u, constant[j], weights == nullptr ? nullptr : weights + j * kPairRows + i);
            if (last) {
              s = s + exponential_of_log_weight(x - most);
            } else {
              most = at_least(most, x);
            }
          });
          most.store(largest + i);
          s.store(sum + i);
        }
      }
    }
    for (int i = 0; i < kPairRows; ++i) {
      if (!(total[i] < kTooSmall<T>)) continue;
      total[i] = sum[i];
      shift[i] = largest[i];
    }
  }

  // reference + base + log(sum) of each row. The backward pass divides by the sums, so behind the last row they are 1.
  template <class Reference>
  void finish(T* sum, double* to, Reference reference) const {
    alignas(64) T log_sum[kPairRows];
    for (int i = rows_.count; i < kPairRows; ++i) sum[i] = T(1);
    for (int i = 0; i < kPairRows; i += V::kLanes) logarithm(V::load(sum + i)).store(log_sum + i);
    for (int i = 0; i < kPairRows; ++i)
      to[i] = static_cast<double>(reference(i)) + static_cast<double>(rows_.base[i]) + static_cast<double>(log_sum[i]);
  }

  const PairwiseArgs& args_;
  const PairwiseScratch& scratch_;
  const int64_t blocks_;
  const Rows<T> rows_;
  const Stats<T> stats_;
  Buffer<T> lost_;
};

template <class T>
constexpr int kVectors = kPairRows / Vec<T>::kLanes;

template <class T>
class Backward {
  using V = Vec<T>;

 public:
  Backward(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t first_group, int groups)
      : args_(args),
        scratch_(scratch),
        rows_(args, first_group, groups),
        dz_(args.dims * rows_.size),
        h_(args.marginals ? args.dims * rows_.size : 0),
        shift_(args.marginals ? args.dims * rows_.size : 0) {
    for (int g = 0; g < groups; ++g) {
      const Stats<T> stats(args, first_group + g);
      const int first = g * kPairRows;
      alignas(64) T of_marginals[kPairRows];
      for (int i = 0; i < kPairRows; ++i) {
        reference_[first + i] = stats.reference[i];
        const int64_t row = rows_.first + first + i;
        const bool there = first + i < rows_.count;
        T g_q(0), h(0);
        own_[first + i] = from_z_[first + i] = T(0);
        if (there && args.decompose) {
          const auto upstream = [&](int k) {
            const T* g = static_cast<const T*>(args.g[k]);
            return g == nullptr ? T(0) : g[args.by_row ? row : 0] * static_cast<T>(1 / args.divisor);
          };
          const T mi = upstream(0), tc = upstream(1), dim = upstream(2);
          g_q = tc - mi;
          h = dim - tc;
          own_[first + i] = mi;
          from_z_[first + i] = T(-0.5) * dim;
        } else if (there && args.g[0] != nullptr) {
          g_q = static_cast<const T*>(args.g[0])[row];
        }
        g_[first + i] = args.joint ? g_q / stats.sum[i] : T(0);
        of_marginals[i] = h;
      }
      for (int64_t d = 0; d < args.dims && args.marginals; ++d) {
        T *h = h_ + d * rows_.size + first, *shift = shift_ + d * rows_.size + first;
        const T* given = args.decompose ? nullptr : static_cast<const T*>(args.g[1]);
        for (int i = 0; i < kPairRows; ++i) {
          h[i] = of_marginals[i];
          if (given != nullptr && first + i < rows_.count) h[i] = given[(rows_.first + first + i) * args.dims + d];
        }
        for (int i = 0; i < kPairRows; i += V::kLanes) {
          (V::load(h + i) / V::load(stats.sum_of(d) + i)).store(h + i);
          V::load(stats.shift_of(d) + i).store(shift + i);
        }
      }
    }
  }

  void run(int64_t begin, int64_t end) {
    const int64_t L = args_.dims;
    const int size = rows_.size;
    for (int64_t d = 0; d < L; ++d)
      for (int i = 0; i < size; ++i)
        dz_[d * size + i] = args_.decompose && begin == 0 ? from_z_[i] * rows_.z[d * size + i] : T(0);
    for (int64_t b = begin; b < end; ++b) {
      const Block<T> block(args_, scratch_, b);
      const T* weights = rows_.weights(block);
      shares(block, weights);
      for (int64_t d = 0; d < L; ++d) {
        const T* shift = nullptr;
        if (args_.marginals) {
          shift = shift_ + d * size;
          if (std::all_of(shift, shift + size, [](T s) { return s == T(0); })) shift = nullptr;
        }
        if (!args_.marginals) {
          dimension<false, false, false>(block, d, nullptr, nullptr);
        } else if (args_.dlog_weight != nullptr) {
          dimension<true, true, true>(block, d, weights, shift);
        } else if (weights != nullptr || shift != nullptr) {
          dimension<true, true, false>(block, d, weights, shift);
        } else {
          dimension<true, false, false>(block, d, nullptr, nullptr);
        }
      }
      if (args_.dlog_weight != nullptr) write_weights(block);
    }
    for (int64_t i = 0; i < L * size; ++i) dz_[i] *= T(-2);
    transpose(static_cast<const T*>(dz_), size, static_cast<T*>(scratch_.dz) + rows_.first * L, L, L, rows_.count);
  }

 private:
  // g times each component's share of the mixture, [kPairComponents][size].
  void shares(const Block<T>& block, const T* weights) {
    const int size = rows_.size;
    if (!args_.joint) {
      std::fill_n(p_, block.padded * size, T(0));
    } else {
      rows_.distances(block, p_);
      // A share below this adds no digit to a gradient, but its products are subnormal, which is slow.
      const V least(Constants<T>::kSmallestNormal * T(int64_t(1) << 40));
      for (int j = 0; j < block.padded; ++j) {
        const T constant = static_cast<const T*>(scratch_.joint)[block.first + j];
        for (int i = 0; i < size; i += V::kLanes) {
          T* at = p_ + j * size + i;
          const V x = joint_exponent(V::load(at), constant, weights == nullptr ? nullptr : weights + j * size + i);
          const V share = exponential_of_log_weight(x - V::load(reference_ + i));
          (V::load(g_ + i) * select(share < least, V(T(0)), share)).store(at);
        }
      }
    }
    if (args_.dlog_weight != nullptr) std::copy_n(p_, block.padded * size, dw_);
    if (args_.decompose) rows_.for_own(block, [&](int i, int j) { p_[j * size + i] += own_[i]; });
  }

  // Adds up the gradients of a block's pairs in one dimension. kOffset: the exponents have weights or shifts.
  template <bool kMarginals, bool kOffset, bool kWeights>
  void dimension(const Block<T>& block, int64_t d, const T* weights, const T* shift) {
    const int size = rows_.size;
    const T *z = rows_.z + d * size, *h = h_ + d * size;
    alignas(64) T dz[kMostRows];
    for (int i = 0; i < size; ++i) dz[i] = T(0);
    for (int j = 0; j < block.count; ++j) {
      const V mu(block.mu(d)[j]), scale(block.scale(d)[j]);
      const T constant = block.constant(d)[j];
      V for_mu[kVectors<T>], for_logvar[kVectors<T>];
      FASTVAE_UNROLL
      for (int k = 0; k < kVectors<T>; ++k) {
        V in_mu(T(0)), in_logvar(T(0));
        for (int i = k * V::kLanes; i < size; i += kPairRows) {
          const V u = scaled_distance(V::load(z + i), mu, scale);
          V g = V::load(p_ + j * size + i);
          if constexpr (kMarginals) {
            V x = marginal_exponent(u, constant, kOffset && weights != nullptr ? weights + j * size + i : nullptr);
            if (kOffset && shift != nullptr) x = x - V::load(shift + i);
            const V share = exponential_of_log_weight(x), h_here = V::load(h + i);
            g = multiply_add(h_here, share, g);
            if constexpr (kWeights) {
              T* dw = dw_ + j * size + i;
              multiply_add(h_here, share, V::load(dw)).store(dw);
            }
          }
          const V gu = g * u;
          multiply_add(gu, scale, V::load(dz + i)).store(dz + i);
          in_mu = in_mu + gu;
          in_logvar = multiply_add(g, d_logvar(u), in_logvar);
        }
        for_mu[k] = in_mu;
        for_logvar[k] = in_logvar;
      }
      const int64_t at = (block.first + j) * args_.dims + d;
      static_cast<T*>(scratch_.dmu)[at] += T(2) * block.scale(d)[j] * sum_of_lanes(for_mu);
      static_cast<T*>(scratch_.dlogvar)[at] += sum_of_lanes(for_logvar);
    }
    T* to = dz_ + d * size;
    for (int i = 0; i < size; ++i) to[i] += dz[i];
  }

  void write_weights(const Block<T>& block) {
    T* to = static_cast<T*>(scratch_.dlog_weight);
    for (int j = 0; j < block.count; ++j) {
      const T* from = dw_ + j * rows_.size;
      if (args_.weight_by_row) {
        for (int i = 0; i < rows_.count; ++i) to[(rows_.first + i) * args_.components + block.first + j] = from[i];
      } else {
        V sum[kVectors<T>];
        for (int k = 0; k < kVectors<T>; ++k) {
          sum[k] = V(T(0));
          for (int i = k * V::kLanes; i < rows_.size; i += kPairRows) sum[k] = sum[k] + V::load(from + i);
        }
        to[block.first + j] += sum_of_lanes(sum);
      }
    }
  }

  const PairwiseArgs& args_;
  const PairwiseScratch& scratch_;
  const Rows<T> rows_;
  Buffer<T> dz_, h_, shift_;
  alignas(64) T p_[kPairComponents * kMostRows], dw_[kPairComponents * kMostRows];
  alignas(64) T g_[kMostRows], reference_[kMostRows], own_[kMostRows], from_z_[kMostRows];
};

template <class T>
void backward_of(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t first, int64_t last, int64_t begin,
                 int64_t end) {
  for (int64_t group = first; group < last; group += cpu::kPairGroups)
    Backward<T>(args, scratch, group, static_cast<int>(std::min<int64_t>(cpu::kPairGroups, last - group)))
        .run(begin, end);
}

void pack(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t block) {
  return args.float64 ? pack_of<double>(args, scratch, block) : pack_of<float>(args, scratch, block);
}
void bound(const PairwiseArgs& args, const PairwiseScratch& scratch) {
  return args.float64 ? bound_of<double>(args, scratch) : bound_of<float>(args, scratch);
}
void forward(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t group) {
  return args.float64 ? Forward<double>(args, scratch, group).run() : Forward<float>(args, scratch, group).run();
}
void backward(const PairwiseArgs& args, const PairwiseScratch& scratch, int64_t first, int64_t last, int64_t begin,
              int64_t end) {
  return args.float64 ? backward_of<double>(args, scratch, first, last, begin, end)
                      : backward_of<float>(args, scratch, first, last, begin, end);
}

}  // namespace
FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Pairwise FASTVAE_PAIRWISE = {FASTVAE_ISA::pack, FASTVAE_ISA::bound, FASTVAE_ISA::forward, FASTVAE_ISA::backward};
}
