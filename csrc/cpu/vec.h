// A vector is two registers of the instruction set at hand. Two, since every operation on it is then two that do not
// wait for each other: on AVX-512 that makes the same normals in two thirds of the time. GCC's and Clang's vector
// extensions carry it; only what they lack is written with intrinsics. Nothing computed may depend on the number of
// lanes.
#pragma once

#include "../math/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

FASTVAE_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kRegisters = 2;

template <class S>
struct Vec {
  static constexpr int kLanes = kRegisters * kRegisterBytes / sizeof(S);
  typedef S Register __attribute__((vector_size(kRegisterBytes)));
  Register part[kRegisters];

  Vec() = default;
  FASTVAE_INLINE Vec(S x) {
    for (int i = 0; i < kRegisters; ++i) part[i] = x - Register{};  // broadcasts; x - 0 is x, the sign of zero included
  }

  // Register by register: a copy of the whole would be cut into pieces that stall on their way through the stack.
  typedef S Unaligned __attribute__((vector_size(kRegisterBytes), aligned(alignof(S)), may_alias));
  static FASTVAE_INLINE Vec load(const S* from) {
    Vec v;
    for (int i = 0; i < kRegisters; ++i)
      v.part[i] = *reinterpret_cast<const Unaligned*>(from + i * (kLanes / kRegisters));
    return v;
  }
  FASTVAE_INLINE void store(S* to) const {
    for (int i = 0; i < kRegisters; ++i) *reinterpret_cast<Unaligned*>(to + i * (kLanes / kRegisters)) = part[i];
  }
};

template <class S>
struct Traits<Vec<S>> {
  using Scalar = S;
  using Int = Vec<typename Traits<S>::Int>;
  using UInt = Vec<typename Traits<S>::UInt>;
};

template <class S>
struct MaskOf;
template <>
struct MaskOf<float> {
  using Type = int32_t;
};
template <>
struct MaskOf<double> {
  using Type = int64_t;
};
template <>
struct MaskOf<uint32_t> {
  using Type = int32_t;
};
template <>
struct MaskOf<uint64_t> {
  using Type = int64_t;
};
template <class S>
using Mask = Vec<typename MaskOf<S>::Type>;  // all bits set where true

#define FASTVAE_BINARY(op)                                                   \
  template <class S>                                                         \
  FASTVAE_INLINE Vec<S> operator op(Vec<S> a, Vec<S> b) {                    \
    for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                                \
  }
FASTVAE_BINARY(+)
FASTVAE_BINARY(-)
FASTVAE_BINARY(*)
FASTVAE_BINARY(/)
FASTVAE_BINARY(&)
FASTVAE_BINARY(|)
FASTVAE_BINARY(^)
#undef FASTVAE_BINARY

#define FASTVAE_COMPARE(op)                                                                                \
  template <class S>                                                                                       \
  FASTVAE_INLINE Mask<S> operator op(Vec<S> a, Vec<S> b) {                                                 \
    Mask<S> m;                                                                                             \
    for (int i = 0; i < kRegisters; ++i) m.part[i] = (typename Mask<S>::Register)(a.part[i] op b.part[i]); \
    return m;                                                                                              \
  }
FASTVAE_COMPARE(<)
FASTVAE_COMPARE(>)
FASTVAE_COMPARE(==)
FASTVAE_COMPARE(!=)
#undef FASTVAE_COMPARE

template <class S>
FASTVAE_INLINE Vec<S> operator-(Vec<S> a) {
  for (int i = 0; i < kRegisters; ++i) a.part[i] = -a.part[i];
  return a;
}
template <class S>
FASTVAE_INLINE Vec<S> operator~(Vec<S> a) {
  for (int i = 0; i < kRegisters; ++i) a.part[i] = ~a.part[i];
  return a;
}
template <class S>
FASTVAE_INLINE Vec<S> operator<<(Vec<S> a, int bits) {
  for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] << bits;
  return a;
}
template <class S>
FASTVAE_INLINE Vec<S> operator>>(Vec<S> a, int bits) {
  for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] >> bits;
  return a;
}

template <class S>
FASTVAE_INLINE Vec<S> select(Mask<S> condition, Vec<S> yes, Vec<S> no) {
  for (int i = 0; i < kRegisters; ++i) no.part[i] = condition.part[i] ? yes.part[i] : no.part[i];
  return no;
}

template <class S>
FASTVAE_INLINE Vec<S> quotient(Vec<S> a, Vec<S> b) {
  return a / b;
}

template <class To, class S>
FASTVAE_INLINE To bit_cast(const Vec<S>& from) {
  To to;
  for (int i = 0; i < kRegisters; ++i) to.part[i] = (typename To::Register)from.part[i];
  return to;
}

FASTVAE_INLINE Vec<float> to_real(Vec<int32_t> a) {
  Vec<float> r;
  for (int i = 0; i < kRegisters; ++i) r.part[i] = __builtin_convertvector(a.part[i], Vec<float>::Register);
  return r;
}
FASTVAE_INLINE Vec<double> to_real(Vec<int64_t> a) {  // |a| < 2^51: added to the bits of 1.5 * 2^52, a is its mantissa
  const Vec<double> magic(6755399441055744.0);
  return bit_cast<Vec<double>>(a + bit_cast<Vec<int64_t>>(magic)) - magic;
}

FASTVAE_INLINE Vec<float> square_root(Vec<float> a) {
#if defined(__AVX512F__)
  for (auto& part : a.part) part = (Vec<float>::Register)_mm512_sqrt_ps((__m512)part);
#elif defined(__AVX2__)
  for (auto& part : a.part) part = (Vec<float>::Register)_mm256_sqrt_ps((__m256)part);
#elif defined(__x86_64__)
  for (auto& part : a.part) part = (Vec<float>::Register)_mm_sqrt_ps((__m128)part);
#else
  for (auto& part : a.part)
    for (int lane = 0; lane < 4; ++lane) part[lane] = __builtin_sqrtf(part[lane]);
#endif
  return a;
}
FASTVAE_INLINE Vec<double> square_root(Vec<double> a) {
#if defined(__AVX512F__)
  for (auto& part : a.part) part = (Vec<double>::Register)_mm512_sqrt_pd((__m512d)part);
#elif defined(__AVX2__)
  for (auto& part : a.part) part = (Vec<double>::Register)_mm256_sqrt_pd((__m256d)part);
#elif defined(__x86_64__)
  for (auto& part : a.part) part = (Vec<double>::Register)_mm_sqrt_pd((__m128d)part);
#else
  for (auto& part : a.part)
    for (int lane = 0; lane < 2; ++lane) part[lane] = __builtin_sqrt(part[lane]);
#endif
  return a;
}

FASTVAE_INLINE Vec<float> to_real_unsigned(Vec<uint32_t> a) {
#if defined(__AVX512F__)
  Vec<float> r;
  for (int i = 0; i < kRegisters; ++i) r.part[i] = (Vec<float>::Register)_mm512_cvtepu32_ps((__m512i)a.part[i]);
  return r;
#else  // two exact halves, added with one rounding
  const Vec<uint32_t> low = a & Vec<uint32_t>(0xffffu);
  return to_real(bit_cast<Vec<int32_t>>(a >> 16)) * Vec<float>(65536.0f) + to_real(bit_cast<Vec<int32_t>>(low));
#endif
}

#if defined(__AVX512F__)
// What AVX-512 has in one instruction, with the same bits. min and max return their second operand where one is a NaN.
FASTVAE_INLINE Vec<float> at_most(Vec<float> x, Vec<float> bound) {
  for (int i = 0; i < kRegisters; ++i)
    x.part[i] = (Vec<float>::Register)_mm512_min_ps((__m512)bound.part[i], (__m512)x.part[i]);
  return x;
}
FASTVAE_INLINE Vec<float> at_least(Vec<float> x, Vec<float> bound) {
  for (int i = 0; i < kRegisters; ++i)
    x.part[i] = (Vec<float>::Register)_mm512_max_ps((__m512)bound.part[i], (__m512)x.part[i]);
  return x;
}
FASTVAE_INLINE Vec<float> scale_by_power(Vec<float> mantissa, Vec<float> n) {
  for (int i = 0; i < kRegisters; ++i)
    mantissa.part[i] = (Vec<float>::Register)_mm512_scalef_ps((__m512)mantissa.part[i], (__m512)n.part[i]);
  return mantissa;
}
FASTVAE_INLINE Vec<double> scale_by_power(Vec<double> mantissa, Vec<double> n) {
  for (int i = 0; i < kRegisters; ++i)
    mantissa.part[i] = (Vec<double>::Register)_mm512_scalef_pd((__m512d)mantissa.part[i], (__m512d)n.part[i]);
  return mantissa;
}
#endif

// The compiler does not find the 32 x 32 -> 64 bit multiplication behind a product of masked 64-bit lanes.
FASTVAE_INLINE Vec<uint64_t> multiply_low32(Vec<uint64_t> a, uint32_t m) {
  using Register [[maybe_unused]] = Vec<uint64_t>::Register;
#if defined(__AVX512F__)
  for (auto& part : a.part) part = (Register)_mm512_mul_epu32((__m512i)part, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  for (auto& part : a.part) part = (Register)_mm256_mul_epu32((__m256i)part, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  for (auto& part : a.part) part = (Register)_mm_mul_epu32((__m128i)part, _mm_set1_epi64x(m));
#else
  for (auto& part : a.part) part = (part & 0xffffffffu) * static_cast<uint64_t>(m);
#endif
  return a;
}

// Past the caches, to memory that is aligned to 64 bytes; fence() before another thread may read it.
FASTVAE_INLINE void stream(float* to, Vec<float> a) {
#if defined(__AVX512F__)
  for (int i = 0; i < kRegisters; ++i) _mm512_stream_ps(to + 16 * i, (__m512)a.part[i]);
#elif defined(__AVX2__)
  for (int i = 0; i < kRegisters; ++i) _mm256_stream_ps(to + 8 * i, (__m256)a.part[i]);
#elif defined(__x86_64__)
  for (int i = 0; i < kRegisters; ++i) _mm_stream_ps(to + 4 * i, (__m128)a.part[i]);
#else
  a.store(to);
#endif
}
FASTVAE_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Within each 128 bits: the lanes of the low (high) half of a and b, in turn.
#if defined(__clang__)
#define FASTVAE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTVAE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif
template <bool kHigh>
FASTVAE_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b) {
  constexpr int h = kHigh ? 2 : 0;
  for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 16 + h, h + 1, 17 + h, 4 + h, 20 + h, 5 + h, 21 + h, 8 + h,
                                24 + h, 9 + h, 25 + h, 12 + h, 28 + h, 13 + h, 29 + h);
#elif defined(__AVX2__)
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 8 + h, h + 1, 9 + h, 4 + h, 12 + h, 5 + h, 13 + h);
#else
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 4 + h, h + 1, 5 + h);
#endif
  }
  return a;
}
template <bool kHigh>
FASTVAE_INLINE Vec<double> interleave(Vec<double> a, Vec<double> b) {
  constexpr int h = kHigh ? 1 : 0;
  for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 8 + h, 2 + h, 10 + h, 4 + h, 12 + h, 6 + h, 14 + h);
#elif defined(__AVX2__)
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 4 + h, 2 + h, 6 + h);
#else
    a.part[i] = FASTVAE_SHUFFLE(a.part[i], b.part[i], h, 2 + h);
#endif
  }
  return a;
}
#undef FASTVAE_SHUFFLE

FASTVAE_NAMESPACE_END
