// How elements travel between memory and registers: a thread takes a pack of kWidth elements that follow one another in
// the logical order. There are two ways:
//
//   Vectors<W>   16-byte accesses. Every operand is rows of contiguous elements, all rows of one length that whole
//                packs fill; or there is one row, whose last elements, too few for a pack, are left to Singles.
//                Types are known to the compiler.
//   Elements<T>  one element at a time, of any strides and any dtype, neighbouring threads taking neighbours.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kernels.h"
#include "../math/scalar.h"

#define FASTVAE_DEVICE __device__ __forceinline__

namespace fastvae::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// The type of the arithmetic on a stored type, and of its results.
template <class Stored>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <class Stored>
using Arithmetic = typename ArithmeticOf<Stored>::Type;

template <class Stored>
constexpr DType kDType = DType::float32;
template <>
constexpr DType kDType<double> = DType::float64;
template <>
constexpr DType kDType<BFloat16> = DType::bfloat16;
template <>
constexpr DType kDType<Float16> = DType::float16;

FASTVAE_DEVICE float widen(float x) { return x; }
FASTVAE_DEVICE double widen(double x) { return x; }
FASTVAE_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
FASTVAE_DEVICE float widen(Float16 x) { return __half2float(x); }

// To the nearest, ties to even.
template <class T>
FASTVAE_DEVICE void narrow(T x, float& to) {
  to = static_cast<float>(x);
}
template <class T>
FASTVAE_DEVICE void narrow(T x, double& to) {
  to = static_cast<double>(x);
}
template <class T>
FASTVAE_DEVICE void narrow(T x, BFloat16& to) {
  to = __float2bfloat16_rn(static_cast<float>(x));
}
template <class T>
FASTVAE_DEVICE void narrow(T x, Float16& to) {
  to = __float2half_rn(static_cast<float>(x));
}

template <class Visit>
FASTVAE_DEVICE void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32:
      return visit(float());
    case DType::float64:
      return visit(double());
    case DType::bfloat16:
      return visit(BFloat16());
    case DType::float16:
      return visit(Float16());
  }
}

FASTVAE_DEVICE double value_of(const Number& number) {
  double value = 1;
  if (number.data != nullptr) {
    with_type(number.dtype, [&](auto type) { value = widen(*static_cast<const decltype(type)*>(number.data)); });
  }
  return value;
}

// ---- Packs. They stay in words as they lie in memory until they are used: as elements, 16-bit ones would take twice
// the registers while they wait.

template <class S, int W>
struct Pack {
  static_assert(sizeof(S) * W % 16 == 0, "a pack is whole 16-byte accesses");
  static constexpr int kQuads = sizeof(S) * W / 16;
  uint4 quad[kQuads];
};

template <class S, int W>
FASTVAE_DEVICE Pack<S, W> load_pack(const S* from) {
  Pack<S, W> pack;
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) pack.quad[q] = reinterpret_cast<const uint4*>(from)[q];
  return pack;
}

template <class S, int W>
FASTVAE_DEVICE void store_pack(S* to, const Pack<S, W>& pack) {
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) __stwb(reinterpret_cast<uint4*>(to) + q, pack.quad[q]);  // never in four pieces
}

FASTVAE_DEVICE void widen_word(uint32_t word, BFloat16, float* to) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
FASTVAE_DEVICE void widen_word(uint32_t word, Float16, float* to) {
  const float2 pair = __half22float2(bit_cast<__half2>(word));
  to[0] = pair.x;
  to[1] = pair.y;
}
FASTVAE_DEVICE void widen_word(uint32_t word, float, float* to) { to[0] = __uint_as_float(word); }
FASTVAE_DEVICE uint32_t narrow_word(const float* from, BFloat16) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(from[0], from[1]));
}
FASTVAE_DEVICE uint32_t narrow_word(const float* from, Float16) {
  return bit_cast<uint32_t>(__floats2half2_rn(from[0], from[1]));
}
FASTVAE_DEVICE uint32_t narrow_word(const float* from, float) { return __float_as_uint(from[0]); }

template <class S, int W>
FASTVAE_DEVICE void widen_pack(const Pack<S, W>& pack, float (&to)[W]) {
  constexpr int kPerWord = 4 / sizeof(S), kPerQuad = 4 * kPerWord;
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) {
    widen_word(pack.quad[q].x, S(), to + q * kPerQuad);
    widen_word(pack.quad[q].y, S(), to + q * kPerQuad + kPerWord);
    widen_word(pack.quad[q].z, S(), to + q * kPerQuad + 2 * kPerWord);
    widen_word(pack.quad[q].w, S(), to + q * kPerQuad + 3 * kPerWord);
  }
}
template <int W>
FASTVAE_DEVICE void widen_pack(const Pack<double, W>& pack, double (&to)[W]) {
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) {
    to[2 * q] = __hiloint2double(pack.quad[q].y, pack.quad[q].x);
    to[2 * q + 1] = __hiloint2double(pack.quad[q].w, pack.quad[q].z);
  }
}

template <class S, int W>
FASTVAE_DEVICE Pack<S, W> narrow_pack(const float (&from)[W]) {
  constexpr int kPerWord = 4 / sizeof(S), kPerQuad = 4 * kPerWord;
  Pack<S, W> pack;
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) {
    const float* at = from + q * kPerQuad;
    pack.quad[q] = {narrow_word(at, S()), narrow_word(at + kPerWord, S()), narrow_word(at + 2 * kPerWord, S()),
                    narrow_word(at + 3 * kPerWord, S())};
  }
  return pack;
}
template <class S, int W>
FASTVAE_DEVICE Pack<double, W> narrow_pack(const double (&from)[W]) {
  Pack<double, W> pack;
  FASTVAE_UNROLL
  for (int q = 0; q < pack.kQuads; ++q) {
    const uint2 first = bit_cast<uint2>(from[2 * q]), second = bit_cast<uint2>(from[2 * q + 1]);
    pack.quad[q] = {first.x, first.y, second.x, second.y};
  }
  return pack;
}

// ---- The ways.

struct RowOperand {
  char* data = nullptr;    // nullptr: absent
  int64_t stride = 0;      // elements from row to row
  bool broadcast = false;  // one element serves a row
  explicit FASTVAE_DEVICE operator bool() const { return data != nullptr; }
};
struct RowShape {
  int64_t numel = 0, columns = 0;
  uint64_t reciprocal = 0;  // of columns, in units of 2^-64, rounded up
};

template <int W>
struct Vectors {
  static constexpr int kWidth = W;
  using Operand = RowOperand;
  using Shape = RowShape;
  struct Place {
    int64_t row, column;
  };
  template <class S>
  using Loaded = Pack<S, W>;

  static FASTVAE_DEVICE Place place(const Shape& shape, int64_t pack) {
    const int64_t i = pack * W;
    if (shape.columns == shape.numel) return {0, i};
    const auto row = static_cast<int64_t>(__umul64hi(i, shape.reciprocal));
    return {row, i - row * shape.columns};
  }
  template <class S>
  static FASTVAE_DEVICE Pack<S, W> load(const Operand& from, const Place& at) {
    return load_pack<S, W>(reinterpret_cast<const S*>(from.data) + at.row * from.stride + at.column);
  }
  template <class S, class T>
  static FASTVAE_DEVICE void unpack(const Pack<S, W>& pack, T (&to)[W]) {
    widen_pack(pack, to);
  }
  template <class T>
  static FASTVAE_DEVICE void load_upstream(const Operand& from, const Place& at, T (&to)[W]) {
    if (from.broadcast) {
      const T x = reinterpret_cast<const T*>(from.data)[at.row * from.stride];
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) to[j] = x;
    } else {
      widen_pack(load<T>(from, at), to);
    }
  }
  template <class S, class T>
  static FASTVAE_DEVICE void store(const Operand& to, const Place& at, const T (&from)[W]) {
    store_pack(reinterpret_cast<S*>(to.data) + at.row * to.stride + at.column, narrow_pack<S, W>(from));
  }
};

// The elements of a single row that are too few for a pack.
struct Singles {
  static constexpr int kWidth = 1;
  using Operand = RowOperand;
  using Shape = RowShape;
  using Place = int64_t;
  template <class S>
  using Loaded = S;

  static FASTVAE_DEVICE Place place(const Shape&, int64_t element) { return element; }
  template <class S>
  static FASTVAE_DEVICE S load(const Operand& from, Place at) {
    return reinterpret_cast<const S*>(from.data)[at];
  }
  template <class S, class T>
  static FASTVAE_DEVICE void unpack(S loaded, T (&to)[1]) {
    to[0] = static_cast<T>(widen(loaded));
  }
  template <class T>
  static FASTVAE_DEVICE void load_upstream(const Operand& from, Place at, T (&to)[1]) {
    to[0] = reinterpret_cast<const T*>(from.data)[from.broadcast ? 0 : at];
  }
  template <class S, class T>
  static FASTVAE_DEVICE void store(const Operand& to, Place at, const T (&from)[1]) {
    narrow(from[0], reinterpret_cast<S*>(to.data)[at]);
  }
};

template <class T>
struct Elements {
  static constexpr int kWidth = 1;

  struct Operand : View {
    explicit FASTVAE_DEVICE operator bool() const { return data != nullptr; }
  };
  struct Shape {};
  using Place = int64_t;
  template <class>
  using Loaded = T;

  static FASTVAE_DEVICE Place place(const Shape&, int64_t element) { return element; }
  template <class>
  static FASTVAE_DEVICE T load(const Operand& from, Place at) {
    const int64_t offset = offset_of(from, at);
    T x;
    with_type(from.dtype,
              [&](auto type) { x = static_cast<T>(widen(static_cast<const decltype(type)*>(from.data)[offset])); });
    return x;
  }
  template <class>
  static FASTVAE_DEVICE void unpack(T loaded, T (&to)[1]) {
    to[0] = loaded;
  }
  static FASTVAE_DEVICE void load_upstream(const Operand& from, Place at, T (&to)[1]) { to[0] = load<T>(from, at); }
  template <class>
  static FASTVAE_DEVICE void store(const Operand& to, Place at, const T (&from)[1]) {
    const int64_t offset = offset_of(to, at);
    with_type(to.dtype, [&](auto type) { narrow(from[0], static_cast<decltype(type)*>(to.data)[offset]); });
  }

 private:
  static FASTVAE_DEVICE int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // a fifth of the work
    return a / b;
  }
  static FASTVAE_DEVICE int64_t offset_of(const View& view, int64_t element) {
    int64_t offset = 0;
#pragma unroll 1  // this way is not made faster by code
    for (int d = view.dims - 1; d > 0; --d) {
      const int64_t rest = quotient(element, view.size[d]);
      offset += (element - rest * view.size[d]) * view.stride[d];
      element = rest;
    }
    return offset + element * view.stride[0];
  }
};

// What takes the elements that Access leaves over.
template <class Access>
struct SinglesOfAccess {
  using Type = Access;
};
template <int W>
struct SinglesOfAccess<Vectors<W>> {
  using Type = Singles;
};
template <class Access>
using SinglesOf = typename SinglesOfAccess<Access>::Type;

// ---- Which way to take (host).

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Fits operands into rows for Vectors<W>. Give it all views first, then ask whether it worked.
template <int W>
class Rows {
 public:
  Rows(int64_t numel, std::initializer_list<const View*> views) {
    shape_.numel = shape_.columns = numel;
    for (const View* view : views) {
      if (view->data == nullptr || view->dims == 1) continue;
      fits_ &= view->dims == 2 && (shape_.columns == numel || shape_.columns == view->size[1]);
      shape_.columns = view->size[1];
    }
    if (shape_.columns == numel) return;
    fits_ &= shape_.columns % W == 0;
    const auto columns = static_cast<uint64_t>(shape_.columns);
    shape_.reciprocal = UINT64_MAX / columns + 1;
    fits_ &= static_cast<uint64_t>(numel) < UINT64_MAX / columns;  // or i * reciprocal >> 64 is no longer i / columns
  }

  // The view as an operand of this dtype; only an upstream gradient may be broadcast along its rows.
  RowOperand operand(const View& view, DType dtype, bool may_broadcast = false) {
    RowOperand operand;
    if (view.data == nullptr || !fits_) return operand;
    const int64_t step = view.stride[view.dims - 1];
    operand.data = static_cast<char*>(view.data);
    operand.broadcast = step == 0;
    operand.stride = view.dims == 2 ? view.stride[0] : step * shape_.columns;
    fits_ &= view.dtype == dtype && (step == 1 || (step == 0 && may_broadcast));
    const int64_t bytes = size_of(dtype);
    if (step != 0) fits_ &= reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && operand.stride * bytes % 16 == 0;
    return operand;
  }
  // One sum for each event needs whole packs in it.
  void sum_over(const Sums& sums) { fits_ &= sums.event % W == 0; }

  bool fit() const { return fits_; }
  const RowShape& shape() const { return shape_; }

 private:
  bool fits_ = true;
  RowShape shape_;
};

}  // namespace fastvae::cuda
