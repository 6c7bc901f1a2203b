// A vector is two registers of the instruction set, so every operation is two instructions that do not wait for each
// other. On AVX-512, normals take two thirds of the time that they take with one register. The code uses the vector
// extensions of GCC and Clang, and intrinsics for what they lack. No result may depend on the number of lanes.
#pragma once

#include <type_traits>
#include <utility>

#include "../math/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

FASTVAE_NAMESPACE_BEGIN

// FASTVAE_X86(op) is the intrinsic for one register, of the types Floats, Doubles and Integers.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#define FASTVAE_X86(op) _mm512_##op
using Floats = __m512;
using Doubles = __m512d;
using Integers = __m512i;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#define FASTVAE_X86(op) _mm256_##op
using Floats = __m256;
using Doubles = __m256d;
using Integers = __m256i;
#else
constexpr int kRegisterBytes = 16;
#if defined(__x86_64__)
#define FASTVAE_X86(op) _mm_##op
using Floats = __m128;
using Doubles = __m128d;
using Integers = __m128i;
#endif
#endif
constexpr int kRegisters = 2;

template <class S>
struct Vec {
  static constexpr int kLanes = kRegisters * kRegisterBytes / sizeof(S);
  typedef S Register __attribute__((vector_size(kRegisterBytes)));
  Register part[kRegisters];

  Vec() = default;
  // Register by register: GCC copies structures of vectors in pieces of 16 bytes, through memory, and waits for them.
  FASTVAE_INLINE Vec(const Vec& other) {
    for (int i = 0; i < kRegisters; ++i) part[i] = other.part[i];
  }
  FASTVAE_INLINE Vec& operator=(const Vec& other) {
    for (int i = 0; i < kRegisters; ++i) part[i] = other.part[i];
    return *this;
  }
  FASTVAE_INLINE Vec(S x) {
    for (int i = 0; i < kRegisters; ++i) part[i] = x - Register{};  // broadcasts; x - 0 is x, also for x = -0
  }

  // Register by register, for the same reason.
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

template <class S>  // all bits set where true
using Mask = Vec<std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;

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

// Bit l is the condition in lane l.
template <class Int>
FASTVAE_INLINE uint32_t bits_of(Vec<Int> condition) {
  constexpr int n = Vec<Int>::kLanes / kRegisters;
  uint32_t bits = 0;
  for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
    const uint32_t part = sizeof(Int) == 4 ? _mm512_movepi32_mask((Integers)condition.part[i])
                                           : _mm512_movepi64_mask((Integers)condition.part[i]);
#elif defined(__x86_64__)
    const auto part = static_cast<uint32_t>(sizeof(Int) == 4 ? FASTVAE_X86(movemask_ps)((Floats)condition.part[i])
                                                             : FASTVAE_X86(movemask_pd)((Doubles)condition.part[i]));
#else
    uint32_t part = 0;
    for (int l = 0; l < n; ++l) part |= static_cast<uint32_t>(condition.part[i][l] & 1) << l;
#endif
    bits |= part << i * n;
  }
  return bits;
}

template <class S>
FASTVAE_INLINE bool any_of(Mask<S> condition, Vec<S>) {
  return bits_of(condition) != 0;
}

#if defined(__FMA__)
FASTVAE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int i = 0; i < kRegisters; ++i)
    c.part[i] = (Vec<float>::Register)FASTVAE_X86(fmadd_ps)((Floats)a.part[i], (Floats)b.part[i], (Floats)c.part[i]);
  return c;
}
FASTVAE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int i = 0; i < kRegisters; ++i)
    c.part[i] =
        (Vec<double>::Register)FASTVAE_X86(fmadd_pd)((Doubles)a.part[i], (Doubles)b.part[i], (Doubles)c.part[i]);
  return c;
}
#elif defined(__aarch64__)
FASTVAE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int i = 0; i < kRegisters; ++i)
    c.part[i] = (Vec<float>::Register)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]);
  return c;
}
FASTVAE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int i = 0; i < kRegisters; ++i)
    c.part[i] =
        (Vec<double>::Register)vfmaq_f64((float64x2_t)c.part[i], (float64x2_t)a.part[i], (float64x2_t)b.part[i]);
  return c;
}
#else  // x86 before 2013: slow, but with the same bits. (Not inlined: the formulas would compile for minutes.)
// In double the product is exact. The sum is rounded to odd: an inexact sum gets an odd last digit. So it is never
// halfway between two floats, and the second rounding goes to the right side (Boldo and Melquiond, 2008).
__attribute__((noinline)) static Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  typedef double Wide __attribute__((vector_size(2 * kRegisterBytes)));
  typedef int64_t WideInt __attribute__((vector_size(2 * kRegisterBytes)));
  for (int i = 0; i < kRegisters; ++i) {
    const Wide product = __builtin_convertvector(a.part[i], Wide) * __builtin_convertvector(b.part[i], Wide);
    const Wide term = __builtin_convertvector(c.part[i], Wide);
    const Wide sum = product + term;
    const Wide back = sum - product;
    const Wide lost = (product - (sum - back)) + (term - back);  // Knuth's two-sum
    const WideInt bits = (WideInt)sum;
    const WideInt even = (bits & 1) - 1;                                    // all bits set, or none
    const WideInt inexact = (WideInt)(lost < 0.0) | (WideInt)(lost > 0.0);  // false for NaN
    const WideInt outward = (((WideInt)lost ^ bits) >> 63) | 1;             // 1, or -1 where the signs differ
    const Wide odd = (Wide)(bits + (outward & even & inexact));
    c.part[i] = __builtin_convertvector(odd, Vec<float>::Register);
  }
  return c;
}
__attribute__((noinline)) static Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int i = 0; i < kRegisters; ++i)
    for (size_t lane = 0; lane < kRegisterBytes / sizeof(double); ++lane)
      c.part[i][lane] = __builtin_fma(a.part[i][lane], b.part[i][lane], c.part[i][lane]);
  return c;
}
#endif

template <class S>
FASTVAE_INLINE Vec<S> absolute(Vec<S> a) {
  using UInt = typename Traits<Vec<S>>::UInt;
  return bit_cast<Vec<S>>(bit_cast<UInt>(a) & ~bit_cast<UInt>(Vec<S>(S(-0.0))));
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
  for (auto& part : a.part) {
#if defined(__x86_64__)
    part = (Vec<float>::Register)FASTVAE_X86(sqrt_ps)((Floats)part);
#else
    for (int lane = 0; lane < 4; ++lane) part[lane] = __builtin_sqrtf(part[lane]);
#endif
  }
  return a;
}
FASTVAE_INLINE Vec<double> square_root(Vec<double> a) {
  for (auto& part : a.part) {
#if defined(__x86_64__)
    part = (Vec<double>::Register)FASTVAE_X86(sqrt_pd)((Doubles)part);
#else
    for (int lane = 0; lane < 2; ++lane) part[lane] = __builtin_sqrt(part[lane]);
#endif
  }
  return a;
}

FASTVAE_INLINE Vec<float> to_real_unsigned(Vec<uint32_t> a) {
#if defined(__AVX512F__)
  Vec<float> r;
  for (int i = 0; i < kRegisters; ++i) r.part[i] = (Vec<float>::Register)_mm512_cvtepu32_ps((__m512i)a.part[i]);
  return r;
#else  // two exact halves, added with one rounding
  const Vec<uint32_t> low = a & Vec<uint32_t>(0xffffu);
  return multiply_add(to_real(bit_cast<Vec<int32_t>>(a >> 16)), Vec<float>(65536.0f),
                      to_real(bit_cast<Vec<int32_t>>(low)));
#endif
}

// Functions of scalar.h and elementary.h that take one instruction here, with the same bits.
#if defined(__x86_64__)
FASTVAE_INLINE Vec<float> at_most(Vec<float> x, Vec<float> bound) {  // min_ps gives its second operand for a NaN
  for (int i = 0; i < kRegisters; ++i)
    x.part[i] = (Vec<float>::Register)FASTVAE_X86(min_ps)((Floats)bound.part[i], (Floats)x.part[i]);
  return x;
}
FASTVAE_INLINE Vec<float> at_least(Vec<float> x, Vec<float> bound) {
  for (int i = 0; i < kRegisters; ++i)
    x.part[i] = (Vec<float>::Register)FASTVAE_X86(max_ps)((Floats)bound.part[i], (Floats)x.part[i]);
  return x;
}
#endif
#if defined(__AVX512F__)
template <bool>
FASTVAE_INLINE Vec<float> scale_by_power(Vec<float> mantissa, Vec<float> n, Vec<float>) {
  for (int i = 0; i < kRegisters; ++i)
    mantissa.part[i] = (Vec<float>::Register)_mm512_scalef_ps((__m512)mantissa.part[i], (__m512)n.part[i]);
  return mantissa;
}
template <bool>
FASTVAE_INLINE Vec<double> scale_by_power(Vec<double> mantissa, Vec<double> n, Vec<double>) {
  for (int i = 0; i < kRegisters; ++i)
    mantissa.part[i] = (Vec<double>::Register)_mm512_scalef_pd((__m512d)mantissa.part[i], (__m512d)n.part[i]);
  return mantissa;
}
#endif

// The compiler does not use the 32 x 32 -> 64 bit multiplication for a product of masked 64-bit lanes.
FASTVAE_INLINE Vec<uint64_t> multiply_low32(Vec<uint64_t> a, uint32_t m) {
#if defined(__x86_64__)
  const Vec<uint64_t> factor(m);
  for (int i = 0; i < kRegisters; ++i)
    a.part[i] = (Vec<uint64_t>::Register)FASTVAE_X86(mul_epu32)((Integers)a.part[i], (Integers)factor.part[i]);
#else
  for (auto& part : a.part) part = (part & 0xffffffffu) * static_cast<uint64_t>(m);
#endif
  return a;
}

// Writes past the caches, to memory that is aligned to 64 bytes. fence() must follow before another thread reads it.
FASTVAE_INLINE void stream(float* to, Vec<float> a) {
#if defined(__x86_64__)
  for (int i = 0; i < kRegisters; ++i)
    FASTVAE_X86(stream_ps)(to + i * (Vec<float>::kLanes / kRegisters), (Floats)a.part[i]);
#else
  a.store(to);
#endif
}
FASTVAE_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#if defined(__clang__)
#define FASTVAE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTVAE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// The sum of all lanes: adds the upper half of the lanes to the lower half, until one is left. The order of the lanes
// is a template's, since GCC makes no constant of one that a loop fills.
template <int half, class Register, int... l>
FASTVAE_INLINE auto sum_of_halves(Register sum, std::integer_sequence<int, l...> lanes) {
  if constexpr (half == 0) {
    return sum[0];
  } else {
    sum = sum + FASTVAE_SHUFFLE(sum, sum, (l + half) % static_cast<int>(sizeof...(l))...);
    return sum_of_halves<half / 2>(sum, lanes);
  }
}
template <class S>
FASTVAE_INLINE S sum_of_lanes(Vec<S> a) {
  constexpr int n = kRegisterBytes / sizeof(S);
  return sum_of_halves<n / 2>(a.part[0] + a.part[1], std::make_integer_sequence<int, n>());
}

// The same for several vectors, added in pairs: the order does not depend on the width of a vector.
template <class S, size_t n>
FASTVAE_INLINE S sum_of_lanes(Vec<S> (&part)[n]) {
  FASTVAE_UNROLL
  for (size_t half = n / 2; half > 0; half /= 2)
    for (size_t k = 0; k < half; ++k) part[k] = part[k] + part[k + half];
  return sum_of_lanes(part[0]);
}

// Within each 128 bits: the lanes of the low (high) half of a and b, in turn.
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

typedef float Quad __attribute__((vector_size(16)));

FASTVAE_INLINE void transpose(Quad (&e)[4]) {
  const Quad a = FASTVAE_SHUFFLE(e[0], e[2], 0, 4, 1, 5), b = FASTVAE_SHUFFLE(e[0], e[2], 2, 6, 3, 7);
  const Quad c = FASTVAE_SHUFFLE(e[1], e[3], 0, 4, 1, 5), d = FASTVAE_SHUFFLE(e[1], e[3], 2, 6, 3, 7);
  e[0] = FASTVAE_SHUFFLE(a, c, 0, 4, 1, 5);
  e[1] = FASTVAE_SHUFFLE(a, c, 2, 6, 3, 7);
  e[2] = FASTVAE_SHUFFLE(b, d, 0, 4, 1, 5);
  e[3] = FASTVAE_SHUFFLE(b, d, 2, 6, 3, 7);
}
#undef FASTVAE_SHUFFLE

FASTVAE_NAMESPACE_END
