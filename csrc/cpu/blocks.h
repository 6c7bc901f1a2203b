// Reads and writes tensors a block at a time. The kernels see contiguous floats or doubles, whatever a tensor's dtype
// and strides. A block that is contiguous and has the kernel's own type is used in place. Any other block goes through
// a buffer in the first-level cache, so no tensor is copied as a whole.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "vec.h"

FASTVAE_NAMESPACE_BEGIN

constexpr int kBlock = 512;  // elements
constexpr int kAlign = 32;   // all blocks but the last have a multiple of this length, and so whole vectors

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// widen() converts to float, exactly; narrow() from float, to the nearest, ties to even. They use integer operations,
// so that the compiler vectorises them and a NaN is kept. Only a subnormal half takes a float addition, to align it.
template <class S>
FASTVAE_INLINE S widen(S x) {  // integers are rounded once, when read as T
  return x;
}
FASTVAE_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTVAE_INLINE float widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t special = normal + ((128u - 16u) << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23));
  const uint32_t bits = magnitude < (1u << 23) ? subnormal : (magnitude >= (31u << 23) ? special : normal);
  return bit_cast<float>(bits | sign);
}
template <class S, class T>
FASTVAE_INLINE void narrow(S x, T& to) {
  to = static_cast<T>(x);
}
template <class T>  // float or a vector of it
FASTVAE_INLINE T rounded_to_bfloat16(T x) {
  using UInt = typename Traits<T>::UInt;
  const UInt bits = bit_cast<UInt>(x);
  const UInt rounded = (bits + UInt(0x7fffu) + ((bits >> 16) & UInt(1u))) & UInt(0xffff0000u);
  return select(x == x, bit_cast<T>(rounded), bit_cast<T>(UInt(0x7fc00000u)));
}
template <class S>
FASTVAE_INLINE void narrow(S x, BFloat16& to) {
  to.bits = static_cast<uint16_t>(bit_cast<uint32_t>(rounded_to_bfloat16(static_cast<float>(x))) >> 16);
}
template <class S>
FASTVAE_INLINE void narrow(S x, Float16& to) {
  const uint32_t all = bit_cast<uint32_t>(static_cast<float>(x));
  const uint32_t bits = all & 0x7fffffffu;
  const uint32_t normal = (bits - ((127u - 15u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const float aligner = 0.5f;  // its unit of rounding is the smallest half
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + aligner) - bit_cast<uint32_t>(aligner);
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u | ((bits >> 13) & 0x3ffu) : 0x7c00u;
  const uint32_t half = bits < (113u << 23) ? subnormal : (bits >= (143u << 23) ? special : normal);
  to.bits = static_cast<uint16_t>(half | ((all >> 16) & 0x8000u));
}

template <class Stored, class T>
FASTVAE_INLINE void widen(const Stored* from, T* to, int n) {
  for (int j = 0; j < n; ++j) to[j] = static_cast<T>(widen(from[j]));
}
template <class T, class Stored>
FASTVAE_INLINE void narrow(const T* from, Stored* to, int n) {
  for (int j = 0; j < n; ++j) narrow(from[j], to[j]);
}
#if defined(__F16C__)
FASTVAE_INLINE void widen(const Float16* from, float* to, int n) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
  for (; j < n; ++j) to[j] = widen(from[j]);
}
FASTVAE_INLINE void narrow(const float* from, Float16* to, int n) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
  for (; j < n; ++j) narrow(from[j], to[j]);
}
#endif

// Calls visit(first element, its offset in memory, length) for each run of [i, i + n) along the innermost dimension.
template <class Visit>
FASTVAE_INLINE void for_each_run(const View& view, int64_t i, int n, Visit visit) {
  const int last = view.dims - 1;
  int64_t index[kMaxDims], offset = 0, rest = i;
  for (int d = last; d >= 0; --d) {
    index[d] = d == 0 ? rest : rest % view.size[d];
    rest = d == 0 ? 0 : rest / view.size[d];
    offset += index[d] * view.stride[d];
  }
  for (int done = 0; done < n;) {
    const int64_t left = view.size[last] - index[last];
    const int run = n - done < left ? n - done : static_cast<int>(left);
    visit(done, offset, run);
    done += run;
    if (done == n) return;
    offset -= index[last] * view.stride[last];
    index[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      offset += view.stride[d];
      if (++index[d] < view.size[d]) break;
      offset -= view.size[d] * view.stride[d];
      index[d] = 0;
    }
  }
}

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;

// The dtypes of outputs, and the dtypes of inputs: these may also be integers.
template <class Visit>
FASTVAE_INLINE void with_float_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float64:
      return visit(double());
    case DType::bfloat16:
      return visit(BFloat16());
    case DType::float16:
      return visit(Float16());
    default:
      return visit(float());
  }
}
template <class Visit>
FASTVAE_INLINE void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::uint8:
      return visit(uint8_t());
    case DType::int8:
      return visit(int8_t());
    case DType::int16:
      return visit(int16_t());
    case DType::int32:
      return visit(int32_t());
    case DType::int64:
      return visit(int64_t());
    default:
      return with_float_type(dtype, visit);
  }
}

// Requests memory that is read soon. The loads come in bursts, so the processor's own prefetching is late.
FASTVAE_INLINE void prefetch(const void* from, size_t bytes) {
  for (size_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b);
}

template <class T>
class Reader {
 public:
  Reader() = default;
  explicit Reader(const View& view) { open(view); }
  void open(const View& view) { view_ = &view; }

  // The elements [i, i + n), and zeros up to a whole vector. Valid until the next call.
  const T* read(int64_t i, int n) {
    if (view_->data == nullptr) return nullptr;
    if (view_->dims == 1 && view_->stride[0] == 1 && view_->dtype == kDType<T> && n % kAlign == 0)
      return static_cast<const T*>(view_->data) + i;
    return gather(i, n);
  }

 private:
  __attribute__((noinline)) const T* gather(int64_t i, int n) {
    const bool constant = view_->dims == 1 && view_->stride[0] == 0;
    if (constant && filled_) return buffer_;
    filled_ = constant;
    if (constant) n = kBlock;
    const T* direct = nullptr;
    with_type(view_->dtype, [&](auto type) {
      using Stored = decltype(type);
      const Stored* data = static_cast<const Stored*>(view_->data);
      const int64_t step = view_->stride[view_->dims - 1];
      if (constant) {
        const T x = static_cast<T>(widen(data[0]));
        for (int j = 0; j < kBlock; ++j) buffer_[j] = x;
        return;
      }
      for_each_run(*view_, i, n, [&](int done, int64_t offset, int run) {
        const Stored* from = data + offset;
        T* to = buffer_ + done;
        if (step == 1) {
          if constexpr (std::is_same_v<Stored, T>) {
            if (run == n && n % kAlign == 0) {
              direct = from;
              return;
            }
          }
          prefetch(from + 2 * run, run * sizeof(Stored));
          widen(from, to, run);
        } else {
          for (int j = 0; j < run; ++j) to[j] = static_cast<T>(widen(from[j * step]));
        }
      });
    });
    if (direct != nullptr) return direct;
    for (int j = n; j % kAlign != 0; ++j) buffer_[j] = T(0);
    return buffer_;
  }

  const View* view_ = nullptr;
  bool filled_ = false;
  alignas(64) T buffer_[kBlock];
};

// An output from this size on leaves the caches before it is read. Writing past them saves reading its lines first.
constexpr int64_t kStreamedBytes = int64_t(16) << 20;

template <class T>
class Writer {
 public:
  Writer() = default;
  explicit Writer(const View& view) { open(view); }
  Writer(const View& view, double*& folds) { open(view, folds); }
  // A folded result is summed up at `folds`. `folds` is then moved behind its sums.
  void open(const View& view, double*& folds) {
    open(view);
    const int64_t size = folded_size(view);
    if (size == 0) return;
    fold_ = folds;
    folds += size;
    plain_ = streamed_ = false;
  }
  void open(const View& view) {
    view_ = &view;
    if (view.data == nullptr) return;
    plain_ = view.dims == 1 && view.stride[0] == 1 && view.dtype == kDType<T>;
    streamed_ = plain_ && sizeof(T) == 4 && view.size[0] * int64_t(sizeof(T)) >= kStreamedBytes &&
                reinterpret_cast<uintptr_t>(view.data) % 64 == 0;
  }
  ~Writer() {
    if (streamed_) fence();
  }
  // Where to write the elements [i, i + n), up to a whole vector; flush() must follow. nullptr if the output is absent.
  T* write(int64_t i, int n) {
    if (view_->data == nullptr) return nullptr;
    i_ = i;
    n_ = n;
    direct_ = plain_ && !streamed_ && n % kAlign == 0;
    return direct_ ? static_cast<T*>(view_->data) + i : buffer_;
  }
  void flush() {
    if (view_->data == nullptr || direct_) return;
    if (fold_ != nullptr) return fold();
    if constexpr (sizeof(T) == 4) {
      if (streamed_ && n_ % kAlign == 0 && i_ % kAlign == 0) {
        float* to = static_cast<float*>(view_->data) + i_;
        for (int j = 0; j < n_; j += Vec<float>::kLanes) stream(to + j, Vec<float>::load(buffer_ + j));
        return;
      }
    }
    scatter();
  }

 private:
  // The order of the additions depends only on the view and the block.
  __attribute__((noinline)) void fold() {
    const int64_t step = view_->stride[view_->dims - 1];
    for_each_run(*view_, i_, n_, [&](int done, int64_t offset, int run) {
      const T* from = buffer_ + done;
      if (step != 0) {
        for (int j = 0; j < run; ++j) fold_[offset + j * step] += static_cast<double>(from[j]);
        return;
      }
      double part[8] = {};
      int j = 0;
      for (; j + 8 <= run; j += 8)
        for (int k = 0; k < 8; ++k) part[k] += static_cast<double>(from[j + k]);
      for (; j < run; ++j) part[0] += static_cast<double>(from[j]);
      fold_[offset] += ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    });
  }

  __attribute__((noinline)) void scatter() {
    with_float_type(view_->dtype, [&](auto type) {
      using Stored = decltype(type);
      const int64_t step = view_->stride[view_->dims - 1];
      for_each_run(*view_, i_, n_, [&](int done, int64_t offset, int run) {
        Stored* to = static_cast<Stored*>(view_->data) + offset;
        const T* from = buffer_ + done;
        if (step == 1) {
          narrow(from, to, run);
        } else {
          for (int j = 0; j < run; ++j) narrow(from[j], to[j * step]);
        }
      });
    });
  }

  const View* view_ = nullptr;
  double* fold_ = nullptr;
  int64_t i_ = 0;
  int n_ = 0;
  bool plain_ = false, streamed_ = false, direct_ = false;
  alignas(64) T buffer_[kBlock];
};

// gradient = scale * derivative * upstream. A gradient from the forward pass was rounded to its tensor's dtype before
// it was multiplied by the upstream gradient. A gradient from the backward pass is rounded at the same point, so both
// have the same bits. (The forward pass never makes float16 gradients.)
template <class T>
class Gradient {
 public:
  Gradient() = default;
  Gradient(const PassArgs& args, const View& tensor)
      : scale_(static_cast<T>(args.scale)),
        round_(args.may_be_kept && tensor.dtype == DType::bfloat16),
        later_(args.may_be_kept && folded_size(tensor) > 0) {}

  FASTVAE_INLINE Vec<T> operator()(Vec<T> derivative, const T* upstream) const {
    Vec<T> g = scale_ * derivative;
    if (upstream != nullptr && !later_) {
      if (round_) g = rounded(g);
      g = g * Vec<T>::load(upstream);
    }
    return g;
  }

 private:
  static FASTVAE_INLINE Vec<float> rounded(Vec<float> g) { return rounded_to_bfloat16(g); }
  static FASTVAE_INLINE Vec<double> rounded(Vec<double> g) {
    for (auto& part : g.part)
      for (size_t l = 0; l < sizeof(part) / sizeof(double); ++l)
        part[l] = rounded_to_bfloat16(static_cast<float>(part[l]));
    return g;
  }

  Vec<T> scale_;
  bool round_ = false;
  bool later_ = false;  // dispatch.cpp multiplies a folded sum by the upstream gradient
};

// Calls step(j) for each vector of a block. Unrolling pays for a light step only.
template <class T, bool kUnroll, class Step>
FASTVAE_INLINE void for_each_vector(int n, Step step) {
  constexpr int w = Vec<T>::kLanes;
  int j = 0;
  if constexpr (kUnroll) {
    for (; j + 2 * w <= n; j += 2 * w) {
      step(j);
      step(j + w);
    }
  }
  for (; j < n; j += w) step(j);
}

FASTVAE_NAMESPACE_END
