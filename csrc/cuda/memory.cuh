// How elements move between memory and registers. A thread takes packs of W elements that are adjacent in the logical
// order. There are two kinds of access:
//
//   Rows<T, W, kPlain>   All operands are rows of one length, a multiple of W. Or there is one row, and its last
//                        elements, too few for a pack, are taken one by one. An operand with aligned packs is read and
//                        written in accesses of 16 bytes (8 for four 16-bit elements), any other in W accesses.
//                        kPlain: all operands are aligned and of type T, and the code tests no dtype.
//   Elements<T, kFolds>  One element at a time, of any strides and dtype. kFolds: folded results go to shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../kernels.h"
#include "../math/scalar.h"

#define FASTVAE_DEVICE __device__ __forceinline__

namespace fastvae::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class Stored>
using Arithmetic = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::float64 : DType::float32;

template <class S>
FASTVAE_DEVICE S widen(S x) {
  return x;
}
FASTVAE_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
FASTVAE_DEVICE float widen(Float16 x) { return __half2float(x); }

// To the nearest, ties to even.
template <class T, class S>
FASTVAE_DEVICE void narrow(T x, S& to) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    to = __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<S, Float16>) {
    to = __float2half_rn(static_cast<float>(x));
  } else {
    to = static_cast<S>(x);
  }
}
template <class S, class T>
FASTVAE_DEVICE T rounded(T x) {
  S narrowed;
  narrow(x, narrowed);
  return static_cast<T>(widen(narrowed));
}

template <bool kIntegers = false, class Visit>
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
    default:
      break;
  }
  if constexpr (kIntegers) {
    switch (dtype) {
      case DType::uint8:
        return visit(uint8_t());
      case DType::int8:
        return visit(int8_t());
      case DType::int16:
        return visit(int16_t());
      case DType::int32:
        return visit(int32_t());
      default:
        return visit(int64_t());
    }
  }
}

FASTVAE_DEVICE double value_of(const Number& number) {
  double value = 1;
  if (number.data != nullptr) {
    with_type(number.dtype, [&](auto type) { value = widen(*static_cast<const decltype(type)*>(number.data)); });
  }
  return value;
}

// ---- Conversions between 16 bytes of memory and elements.

// Two 16-bit elements, which share a word.
FASTVAE_DEVICE void widen_word(uint32_t word, BFloat16, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
FASTVAE_DEVICE void widen_word(uint32_t word, Float16, float& first, float& second) {
  const float2 pair = __half22float2(bit_cast<__half2>(word));
  first = pair.x;
  second = pair.y;
}
FASTVAE_DEVICE uint32_t narrow_word(float first, float second, BFloat16) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
}
FASTVAE_DEVICE uint32_t narrow_word(float first, float second, Float16) {
  return bit_cast<uint32_t>(__floats2half2_rn(first, second));
}
FASTVAE_DEVICE void from_quad(uint4 quad, float* to) {
  to[0] = __uint_as_float(quad.x);
  to[1] = __uint_as_float(quad.y);
  to[2] = __uint_as_float(quad.z);
  to[3] = __uint_as_float(quad.w);
}
FASTVAE_DEVICE void from_quad(uint4 quad, double* to) {
  to[0] = __hiloint2double(quad.y, quad.x);
  to[1] = __hiloint2double(quad.w, quad.z);
}
FASTVAE_DEVICE uint4 to_quad(const float* from) {
  return {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]), __float_as_uint(from[3])};
}
FASTVAE_DEVICE uint4 to_quad(const double* from) {
  const uint2 first = bit_cast<uint2>(from[0]), second = bit_cast<uint2>(from[1]);
  return {first.x, first.y, second.x, second.y};
}

// Load and store a pack at an aligned address. (__stwb is never split into four stores.)
template <class T, int W>
FASTVAE_DEVICE void load_pack(const void* from, T (&to)[W]) {
  constexpr int n = 16 / sizeof(T);
  FASTVAE_UNROLL
  for (int q = 0; q < W / n; ++q) from_quad(static_cast<const uint4*>(from)[q], to + q * n);
}
template <class T, int W>
FASTVAE_DEVICE void store_pack(void* to, const T (&from)[W]) {
  constexpr int n = 16 / sizeof(T);
  FASTVAE_UNROLL
  for (int q = 0; q < W / n; ++q) __stwb(static_cast<uint4*>(to) + q, to_quad(from + q * n));
}
template <class S, int W>
FASTVAE_DEVICE void store_narrow_pack(void* to, const float (&from)[W]) {
  uint32_t word[W / 2];
  FASTVAE_UNROLL
  for (int k = 0; k < W / 2; ++k) word[k] = narrow_word(from[2 * k], from[2 * k + 1], S());
  if constexpr (W == 8) {
    __stwb(static_cast<uint4*>(to), uint4{word[0], word[1], word[2], word[3]});
  } else {
    __stwb(static_cast<uint2*>(to), uint2{word[0], word[1]});
  }
}

// ---- The two kinds of access.

constexpr DType kPieces = DType(-1);

struct RowOperand {
  char* data = nullptr;  // nullptr: absent
  uint32_t stride = 0;   // bytes from row to row
  uint32_t step = 0;     // bytes from element to element; 0: one element serves a row
  DType dtype = DType::float32;
  DType pack = kPieces;   // the dtype if a pack is read and written as words, else kPieces
  bool is_dense = false;  // packs are aligned and without gaps
  explicit FASTVAE_DEVICE operator bool() const { return data != nullptr; }
};
// A single row is treated as rows of 2^kRowBits elements, so that 32 bits are enough for an index.
constexpr int kRowBits = 24;
struct RowShape {
  uint32_t columns = 0;
  uint64_t reciprocal = 0;  // 2^64 / columns, rounded up; 0: a single row
};

template <class Type_, int W, bool kPlain>
struct Rows {
  using Type = Type_;
  static constexpr int kWidth = W;
  using Singles = Rows<Type_, 1, false>;  // for the elements behind the last pack
  using Operand = RowOperand;
  using Shape = RowShape;
  struct Place {
    uint32_t row, column;
  };
  // 16-bit elements stay packed, two in the bits of a float, until they are used. That takes fewer registers.
  struct Loaded {
    Type x[W];
  };

  static FASTVAE_DEVICE Place place(const Shape& shape, int64_t pack) {
    const int64_t i = pack * W;
    if (shape.reciprocal == 0)
      return {static_cast<uint32_t>(i >> kRowBits), static_cast<uint32_t>(i) & ((1u << kRowBits) - 1)};
    const auto row = static_cast<uint32_t>(__umul64hi(i, shape.reciprocal));
    return {row, static_cast<uint32_t>(i) - row * shape.columns};
  }

  template <bool kIntegers = false, bool kMayBroadcast = !kPlain>
  static FASTVAE_DEVICE Loaded load(const Operand& from, const Place& at) {
    const char* const place = address<kMayBroadcast>(from, at);
    Loaded to;
    if constexpr (W > 1) {
      if (kPlain ? !kMayBroadcast || from.step != 0 : from.pack == kDType<Type>) {
        load_pack(place, to.x);
        return to;
      }
      if constexpr (!kPlain && sizeof(Type) == 4) {
        if (from.pack != kPieces) {
          if constexpr (W == 8) {
            from_quad(*reinterpret_cast<const uint4*>(place), to.x);
          } else {
            const uint2 words = *reinterpret_cast<const uint2*>(place);
            to.x[0] = __uint_as_float(words.x);
            to.x[1] = __uint_as_float(words.y);
          }
          return to;
        }
      }
    }
    if constexpr (kPlain) {
      const Type x = *reinterpret_cast<const Type*>(place);
      FASTVAE_UNROLL
      for (int j = 0; j < W; ++j) to.x[j] = x;
    } else {
      with_type<kIntegers>(from.dtype, [&](auto type) {
        using S = decltype(type);
        if constexpr (std::is_integral_v<S> && W > 1) {
          constexpr int kAlign = sizeof(S) * W < 16 ? sizeof(S) * W : 16;
          struct alignas(kAlign) Piece {
            S x[W];
          };
          if (from.is_dense) {
            const Piece piece = *reinterpret_cast<const Piece*>(place);
            FASTVAE_UNROLL
            for (int j = 0; j < W; ++j) to.x[j] = static_cast<Type>(piece.x[j]);
            return;
          }
        }
        FASTVAE_UNROLL
        for (int j = 0; j < W; ++j)
          to.x[j] = static_cast<Type>(widen(*reinterpret_cast<const S*>(place + j * from.step)));
      });
    }
    return to;
  }

  static FASTVAE_DEVICE void unpack(const Operand& from, const Loaded& loaded, Type (&to)[W]) {
    if constexpr (!kPlain && W > 1 && sizeof(Type) == 4) {
      if (from.pack == DType::bfloat16) return unpack_as<BFloat16>(loaded, to);
      if (from.pack == DType::float16) return unpack_as<Float16>(loaded, to);
    }
    FASTVAE_UNROLL
    for (int j = 0; j < W; ++j) to[j] = loaded.x[j];
  }

  static FASTVAE_DEVICE void store(const Operand& to, const Place& at, const Type (&from)[W]) {
    char* const place = address<!kPlain>(to, at);
    if constexpr (W > 1) {
      if (kPlain || to.pack == kDType<Type>) return store_pack(place, from);
      if constexpr (sizeof(Type) == 4) {
        if (to.pack == DType::bfloat16) return store_narrow_pack<BFloat16>(place, from);
        if (to.pack == DType::float16) return store_narrow_pack<Float16>(place, from);
      }
    }
    if constexpr (!kPlain) {
      with_type(to.dtype, [&](auto type) {
        FASTVAE_UNROLL
        for (int j = 0; j < W; ++j) narrow(from[j], *reinterpret_cast<decltype(type)*>(place + j * to.step));
      });
    }
  }

 private:
  template <bool kAnyStep>
  static FASTVAE_DEVICE char* address(const Operand& operand, const Place& at) {
    const uint32_t step = kAnyStep ? operand.step : sizeof(Type);
    return operand.data + uint64_t(at.row) * operand.stride + uint64_t(at.column) * step;
  }
  template <class S>
  static FASTVAE_DEVICE void unpack_as(const Loaded& loaded, float (&to)[W]) {
    FASTVAE_UNROLL
    for (int k = 0; k < W / 2; ++k) widen_word(__float_as_uint(loaded.x[k]), S(), to[2 * k], to[2 * k + 1]);
  }
};

// The elements of a tile; the most folded results. Shared memory has a row of kTile values for each result.
constexpr int kTile = 512, kMaxFolded = kMaxInputs + 1;

template <class Type_, bool kFolds>
struct Elements {
  using Type = Type_;
  static constexpr int kWidth = 1;
  using Singles = Elements;
  struct Operand : View {
    int fold = -1;  // the row of a folded result
    explicit FASTVAE_DEVICE operator bool() const { return data != nullptr; }
  };
  struct Shape {};
  struct Place {
    int64_t element;
    int in_tile = 0;
  };
  struct Loaded {
    Type x;
  };

  static FASTVAE_DEVICE Place place(const Shape&, int64_t element) { return {element}; }
  template <bool kIntegers = false, bool kMayBroadcast = true>
  static FASTVAE_DEVICE Loaded load(const Operand& from, const Place& at) {
    const int64_t offset = offset_of(from, at.element);
    Loaded to;
    with_type<kIntegers>(from.dtype, [&](auto type) {
      to.x = static_cast<Type>(widen(static_cast<const decltype(type)*>(from.data)[offset]));
    });
    return to;
  }
  static FASTVAE_DEVICE void unpack(const Operand&, const Loaded& loaded, Type (&to)[1]) { to[0] = loaded.x; }
  static FASTVAE_DEVICE void store(const Operand& to, const Place& at, const Type (&from)[1]) {
    if constexpr (kFolds) {
      if (to.fold >= 0) {
        tile()[to.fold * kTile + at.in_tile] = from[0];
        return;
      }
    }
    const int64_t offset = offset_of(to, at.element);
    with_type(to.dtype, [&](auto type) { narrow(from[0], static_cast<decltype(type)*>(to.data)[offset]); });
  }
  static FASTVAE_DEVICE Type* tile() {
    __shared__ Type values[kMaxFolded * kTile];
    return values;
  }
  static FASTVAE_DEVICE int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // a fifth of the time
    return a / b;
  }
  static FASTVAE_DEVICE int64_t offset_of(const View& view, int64_t element) {
    int64_t offset = 0;
#pragma unroll 1  // unrolling would not make this faster
    for (int d = view.dims - 1; d > 0; --d) {
      const int64_t rest = quotient(element, view.size[d]);
      offset += (element - rest * view.size[d]) * view.stride[d];
      element = rest;
    }
    return offset + element * view.stride[0];
  }
};

// ---- On the host: which kind of access to use.

inline int64_t size_of(DType dtype) {
  constexpr int kSizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8};
  return kSizes[static_cast<int>(dtype)];
}

// Whether views can be seen as rows, and how. may_broadcast: the step within a row may be 0, even in plain rows.
class RowFit {
 public:
  RowFit(int64_t numel, int64_t event, DType arithmetic)
      : numel_(numel), columns_(numel), event_(event), arithmetic_(arithmetic) {}

  void add(const View& view, bool may_broadcast = false) {
    if (view.data == nullptr) return;
    if (view.dims == 2 && (columns_ == numel_ || columns_ == view.size[1])) columns_ = view.size[1];
    fits_ &= view.dims == 1 || (view.dims == 2 && columns_ == view.size[1]);
    narrowest_ = std::min(narrowest_, size_of(view.dtype));
    is_plain_ &= view.dtype == DType::float32;
    const int64_t step = view.stride[view.dims - 1];
    if (step == 0 && may_broadcast) return;
    is_plain_ &= step == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
    is_plain_ &= view.dims == 1 || view.stride[0] % 4 == 0;
  }

  // Whether packs of this width fit.
  bool fits(int width) const {
    return fits_ && columns_ > 0 && event_ % width == 0 &&
           (columns_ == numel_ || (columns_ % width == 0 && columns_ < UINT32_MAX && numel_ / columns_ < UINT32_MAX &&
                                   static_cast<uint64_t>(numel_) < UINT64_MAX / columns_));  // place() relies on this
  }
  bool is_plain() const { return is_plain_; }
  bool has_narrow() const { return narrowest_ <= 2; }
  RowShape shape() const {
    if (columns_ == numel_) return {};
    return {static_cast<uint32_t>(columns_), UINT64_MAX / columns_ + 1};
  }
  // The view as an operand for packs of this width. `fits` becomes false if 32 bits are not enough for its stride.
  RowOperand operand(const View& view, int width, bool& fits) const {
    RowOperand operand;
    if (view.data == nullptr) return operand;
    const int64_t size = size_of(view.dtype), step = view.stride[view.dims - 1] * size;
    const int64_t stride =
        view.dims == 2 ? view.stride[0] * size : step * (columns_ == numel_ ? int64_t(1) << kRowBits : columns_);
    fits &= stride <= UINT32_MAX;
    operand.data = static_cast<char*>(view.data);
    operand.stride = static_cast<uint32_t>(stride);
    operand.step = static_cast<uint32_t>(step);
    operand.dtype = view.dtype;
    const int64_t align = std::min<int64_t>(16, width * size);
    operand.is_dense = step == size && reinterpret_cast<uintptr_t>(view.data) % align == 0 && stride % align == 0;
    const bool is_half = view.dtype == DType::bfloat16 || view.dtype == DType::float16;
    if (operand.is_dense && (view.dtype == arithmetic_ || (is_half && arithmetic_ == DType::float32)))
      operand.pack = view.dtype;
    return operand;
  }

 private:
  int64_t numel_, columns_, event_, narrowest_ = 8;
  DType arithmetic_;
  bool fits_ = true, is_plain_ = true;
};

}  // namespace fastvae::cuda
