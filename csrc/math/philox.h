// The noise: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) turned
// into normals by Box and Muller. Element i of a draw depends on (seed, offset, i) alone: key = seed, counter = i / 4
// (i / 2 for double) in the low 64 bits and offset in the high ones.
#pragma once

#include "elementary.h"

FASTVAE_NAMESPACE_BEGIN

// Ten rounds on the counter c, in place. Each word lies in the low half of a 64-bit integer (or of a vector's lanes);
// what the upper halves hold is ignored on the way in and garbage on the way out.
template <class U64>
FASTVAE_INLINE void philox4x32_10(U64 (&c)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const U64 product0 = multiply_low32(c[0], 0xD2511F53u);
    const U64 product1 = multiply_low32(c[2], 0xCD9E8D57u);
    c[0] = (product1 >> 32) ^ c[1] ^ U64(key0);
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ U64(key1);
    c[3] = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Two standard normals: radius sqrt(-2 ln u) from one word, angle from another. u lies in (0, 1] and uses all bits of
// its word; the angle's quadrant is taken off in integers, exactly, before sine and cosine see the rest.
template <class T, class UInt>
FASTVAE_INLINE T uniform_from_word(UInt word, float) {  // (word + 1/2) / 2^32
  using Int = typename Traits<T>::Int;
  const T high = to_real(bit_cast<Int>(word >> 16)), low = to_real(bit_cast<Int>(word & UInt(0xffffu)));
  return ((high * T(65536.0f) + low) + T(0.5f)) * T(2.3283064365386962890625e-10f);
}
template <class T, class UInt>
FASTVAE_INLINE T uniform_from_word(UInt word, double) {  // (top 53 bits + 1/2) / 2^53
  using Int = typename Traits<T>::Int;
  const UInt bits = word >> 11;
  const T high = to_real(bit_cast<Int>(bits >> 32)), low = to_real(bit_cast<Int>(bits & UInt(0xffffffffu)));
  return ((high * T(4294967296.0) + low) + T(0.5)) * T(1.1102230246251565404e-16);
}

template <class T>
FASTVAE_INLINE T angle_from_rest(typename Traits<T>::Int rest, float) {  // rest in [-2^29, 2^29)
  return to_real(rest) * T(1.4629180792671596e-9f);                      // 2 pi / 2^32
}
template <class T>
FASTVAE_INLINE T angle_from_rest(typename Traits<T>::Int rest, double) {  // rest in [-2^61, 2^61): its top 51 bits
  return to_real(rest >> 11) * T(6.9757369960172635e-16);                 // 2 pi / 2^53
}

template <class T, class UInt>
FASTVAE_INLINE void box_muller(UInt radius_word, UInt angle_word, T& first, T& second) {
  using S = ScalarOf<T>;
  using Int = typename Traits<T>::Int;
  constexpr int kBits = 8 * sizeof(S);
  // u and 1 - u: both words and their complements count from 1/2.
  const T u = uniform_from_word<T>(radius_word, S()), v = uniform_from_word<T>(~radius_word, S());
  const T radius = square_root(logarithm(u, v) * T(S(-2)));
  // The angle is word / 2^bits of a turn = quadrant / 4 + rest / 2^bits with rest within an eighth of a turn of zero.
  const UInt quadrant = (angle_word + (UInt(1) << (kBits - 3))) >> (kBits - 2);
  const Int rest = bit_cast<Int>(angle_word - (quadrant << (kBits - 2)));
  T sine, cosine;
  sine_cosine(angle_from_rest<T>(rest, S()), sine, cosine);
  const auto swap = (quadrant & UInt(1)) != UInt(0);
  const T c = select(swap, sine, cosine), s = select(swap, cosine, sine);
  // cos is negative in quadrants 1 and 2, sin in 2 and 3.
  const UInt sign_c = ((quadrant + UInt(1)) & UInt(2)) << (kBits - 2), sign_s = (quadrant & UInt(2)) << (kBits - 2);
  first = bit_cast<T>(bit_cast<UInt>(radius * c) ^ sign_c);
  second = bit_cast<T>(bit_cast<UInt>(radius * s) ^ sign_s);
}

FASTVAE_NAMESPACE_END
