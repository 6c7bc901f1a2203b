// The lanes of a vector take neighbouring columns of T. Compiled once for each instruction set; FASTVAE_ISA and
// FASTVAE_MULTIVARIATE name this copy.
#include <algorithm>
#include <memory>

#include "../cpu/vec.h"
#include "multivariate.h"

FASTVAE_NAMESPACE_BEGIN
namespace {

// A sum over columns has this many lanes on every instruction set, so that its order is the same. Rows of T are worked
// on in blocks of the same size.
template <class T>
constexpr int kColumns = 128 / sizeof(T);
template <class T>
constexpr int kVectors = kColumns<T> / Vec<T>::kLanes;

// Whether each lane is one of the first `count`.
template <class T>
FASTVAE_INLINE Mask<T> first_lanes(int64_t count) {
  alignas(64) static constexpr T kLane[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  return Vec<T>::load(kLane) < Vec<T>(static_cast<T>(count));
}

// The matrices of some rows of mu. A vector may reach over the end of a matrix's row, but not of the tensor, so the
// last matrices are copied. Vectors of mu, eps and dz are copied too, to memory with room behind them.
template <class T>
class Rows {
 public:
  explicit Rows(const MultivariateArgs& args)
      : args(args), padded((args.dims + kColumns<T> - 1) / kColumns<T> * kColumns<T>), memory_(new T[3 * padded]()) {}

  // Row b of a [B, L] tensor, with zeros behind it; zeros if the tensor is absent. `place` is one of 0, 1, 2.
  T* vector(const void* from, int64_t b, int place) {
    T* to = memory_.get() + place * padded;
    if (from != nullptr) std::copy_n(static_cast<const T*>(from) + b * args.dims, args.dims, to);
    return to;
  }
  const T* matrix(int64_t b) {
    const T* from = static_cast<const T*>(args.scale_tril) + b * args.size();
    if ((args.rows - 1 - b) * args.size() >= kColumns<T>) return from;
    if (copy_ == nullptr) copy_.reset(new T[args.size() + kColumns<T>]());
    std::copy_n(from, args.size(), copy_.get());
    return copy_.get();
  }

  const MultivariateArgs& args;
  const int64_t padded;  // L, rounded up to whole blocks

 private:
  std::unique_ptr<T[]> memory_, copy_;
};

template <class T, bool kSample>
void forward_of(const MultivariateArgs& args, double* kl, int64_t first, int64_t last) {
  using V = Vec<T>;
  constexpr int n = kColumns<T>;
  const T half(0.5);
  Rows<T> rows(args);
  for (int64_t b = first; b < last; ++b) {
    const T *mu = rows.vector(args.mu, b, 0), *eps = rows.vector(args.eps, b, 1);
    const T* matrix = rows.matrix(b);
    double sum = 0;
    for (int64_t block = 0; block < args.dims; block += n) {
      V squares[kVectors<T>];  // below the diagonal; at the end of the block all that it adds to the KL
      for (int k = 0; k < kVectors<T>; ++k) squares[k] = V(T(0));
      alignas(64) T moved[n], diagonal[n];  // behind the last row: ones, which add nothing to the KL
      const int64_t end = std::min(block + n, args.dims);
      std::fill_n(diagonal, n, T(1));
      for (int64_t i = block; i < end; ++i) {
        const T* row = matrix + args.row(i);
        V dot[kVectors<T>];
        FASTVAE_UNROLL
        for (int k = 0; k < kVectors<T>; ++k) dot[k] = V(T(0));
        for (int64_t j = 0; j < i; j += n) {
          FASTVAE_UNROLL
          for (int k = 0; k < kVectors<T>; ++k) {
            const int64_t at = j + k * V::kLanes;
            if (at >= i) break;
            V t = V::load(row + at), e = V::load(eps + at);
            if (at + V::kLanes > i) {
              const auto below = first_lanes<T>(i - at);
              t = select(below, t, V(T(0)));
              if (kSample) e = select(below, e, V(T(0)));
            }
            if (kSample) dot[k] = multiply_add(t, e, dot[k]);
            squares[k] = multiply_add(t, t, squares[k]);
          }
        }
        if (kSample) moved[i - block] = sum_of_lanes(dot) + T(0);  // 0, not -0
        diagonal[i - block] = row[i];
      }
      FASTVAE_UNROLL
      for (int k = 0; k < kVectors<T>; ++k) {
        const int64_t at = block + k * V::kLanes;
        const V m = V::load(mu + at), t = V::load(diagonal + k * V::kLanes);
        squares[k] = V(half) * multiply_add(m, m, squares[k]) + diagonal_term(t).value;
        if (!kSample || at >= args.dims) continue;
        alignas(64) T z[V::kLanes];
        (m + multiply_add(t, V::load(eps + at), V::load(moved + k * V::kLanes))).store(z);
        std::copy_n(z, std::min<int64_t>(V::kLanes, end - at), static_cast<T*>(args.z) + b * args.dims + at);
      }
      sum += static_cast<double>(sum_of_lanes(squares));
    }
    kl[b] = sum;
  }
}

template <class T>
void backward_of(const MultivariateArgs& args, int64_t first, int64_t last) {
  using V = Vec<T>;
  constexpr int n = kColumns<T>;
  Rows<T> rows(args);
  T* const end = static_cast<T*>(args.dscale_tril) + last * args.size();  // where other threads' matrices begin
  const std::unique_ptr<T[]> deps(args.deps == nullptr ? nullptr : new T[rows.padded]);
  for (int64_t b = first; b < last; ++b) {
    // What an absent gradient would multiply is absent too: 0 times infinity would be NaN.
    const T* eps = rows.vector(args.dz != nullptr ? args.eps : nullptr, b, 0);
    const T* mu = rows.vector(args.g != nullptr ? args.mu : nullptr, b, 2);
    const T* dz = rows.vector(args.dz, b, 1);
    const T g = args.upstream<T>(b);
    if (args.dmu != nullptr) {
      T* to = static_cast<T*>(args.dmu) + b * args.dims;
      for (int64_t i = 0; i < args.dims; ++i) to[i] = dz[i] + g * mu[i];
    }
    if (args.dscale_tril == nullptr && deps == nullptr) continue;
    const T* matrix = rows.matrix(b);
    T* const d_matrix = static_cast<T*>(args.dscale_tril) + b * args.size();
    if (deps != nullptr) std::fill_n(deps.get(), rows.padded, T(0));
    for (int64_t block = 0; block < args.dims; block += n) {
      alignas(64) T diagonal[n] = {};
      const int64_t last_row = std::min(block + n, args.dims);
      for (int64_t i = block; i < last_row; ++i) {
        const T* row = matrix + args.row(i);
        diagonal[i - block] = row[i];
        const V dz_i(dz[i]);
        for (int64_t j = 0; j <= i && deps != nullptr && args.dz != nullptr; j += V::kLanes) {
          const V sum = V::load(deps.get() + j);
          select(first_lanes<T>(i + 1 - j), multiply_add(V::load(row + j), dz_i, sum), sum).store(deps.get() + j);
        }
        if (args.dscale_tril == nullptr) continue;
        // What is written behind a row is written again with the next one.
        T* const to = d_matrix + args.row(i);
        const int64_t columns = args.packed ? i + 1 : args.dims;
        for (int64_t j = 0; j < columns; j += V::kLanes) {
          V d(T(0));
          if (j < i) {
            d = d_scale_tril(dz_i, V::load(eps + j), V(g), args.g != nullptr ? V::load(row + j) : V(T(0)));
            if (j + V::kLanes > i) d = select(first_lanes<T>(i - j), d, V(T(0)));
          }
          if (end - (to + j) >= V::kLanes) {
            d.store(to + j);
          } else {
            alignas(64) T some[V::kLanes];
            d.store(some);
            std::copy_n(some, columns - j, to + j);
          }
        }
      }
      for (int64_t i = block; i < last_row && args.dscale_tril != nullptr; i += V::kLanes) {
        V slope = diagonal_term(V::load(diagonal + (i - block))).d;
        if (args.g == nullptr) slope = V(T(0));  // it is infinite where T_ii is 0
        alignas(64) T d[V::kLanes];
        d_scale_tril(V::load(dz + i), V::load(eps + i), V(g), slope).store(d);
        for (int64_t k = i; k < std::min<int64_t>(i + V::kLanes, last_row); ++k) d_matrix[args.row(k) + k] = d[k - i];
      }
    }
    if (deps != nullptr) std::copy_n(deps.get(), args.dims, static_cast<T*>(args.deps) + b * args.dims);
  }
}

void forward(const MultivariateArgs& args, double* kl, int64_t first, int64_t last) {
  const auto run = args.float64 ? (args.eps != nullptr ? forward_of<double, true> : forward_of<double, false>)
                                : (args.eps != nullptr ? forward_of<float, true> : forward_of<float, false>);
  run(args, kl, first, last);
}
void backward(const MultivariateArgs& args, int64_t first, int64_t last) {
  return args.float64 ? backward_of<double>(args, first, last) : backward_of<float>(args, first, last);
}

}  // namespace
FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Multivariate FASTVAE_MULTIVARIATE = {FASTVAE_ISA::forward, FASTVAE_ISA::backward};
}
