// The noise: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) turned
// into normals by Box and Muller. Element i of a draw depends on (seed, offset, i) alone: key = seed, counter = i / 4
// (i / 2 for double) in the low 64 bits and offset in the high ones.
#pragma once

#include "elementary.h"

FASTVAE_NAMESPACE_BEGIN

// Ten rounds on the counter c, in place. Each word is in the low half of a 64-bit integer (or of each lane of a
// vector). The upper halves are ignored on input and undefined on output.
template <class U64>
FASTVAE_INLINE void philox4x32_10(U64 (&c)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  FASTVAE_UNROLL
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

// One Philox call.
FASTVAE_INLINE void philox(uint64_t seed, uint64_t offset, uint64_t counter, uint64_t (&word)[4]) {
  word[0] = counter;
  word[1] = counter >> 32;
  word[2] = offset;
  word[3] = offset >> 32;
  philox4x32_10(word, seed);
}

// The random words of elements i, i + 1, ...: of 32 bits for float, of 64 for double.
template <class T>
class RandomWords {
 public:
  FASTVAE_INLINE RandomWords(uint64_t seed, uint64_t offset, uint64_t i) : seed_(seed), offset_(offset), i_(i) {
    philox(seed, offset, i / kPer, word_);
  }
  FASTVAE_INLINE typename Traits<T>::UInt operator()() {
    const int place = static_cast<int>(i_ % kPer);
    uint64_t word = word_[0];
    FASTVAE_UNROLL
    for (int j = 0; j < kPer; ++j) {  // word_[place] would move the words to memory on a GPU
      if (place != j) continue;
      if constexpr (kPer == 4) {
        word = word_[j];
      } else {
        word = (word_[2 * j] & 0xffffffffu) | (word_[2 * j + 1] << 32);
      }
    }
    if (++i_ % kPer == 0) philox(seed_, offset_, i_ / kPer, word_);
    return static_cast<typename Traits<T>::UInt>(word);
  }

 private:
  static constexpr int kPer = 16 / sizeof(T);
  uint64_t seed_, offset_, i_, word_[4];
};

// A word plus 1/2, in (0, 2^bits): a word and its complement add up to 2^bits. bits is 32, for double the top 53 of 64.
template <class T, class UInt>
FASTVAE_INLINE T number_from_word(UInt word, float) {
  return to_real_unsigned(word) + T(0.5f);
}
template <class T, class UInt>
FASTVAE_INLINE T number_from_word(UInt word, double) {
  using Int = typename Traits<T>::Int;
  const UInt bits = word >> 11;
  const T high = to_real(bit_cast<Int>(bits >> 32)), low = to_real(bit_cast<Int>(bits & UInt(0xffffffffu)));
  return multiply_add(high, T(4294967296.0), low) + T(0.5);
}

// That number over 2^bits, minus 1. It is computed from the word's complement, to have all its digits near 0. In float
// only results above -1/2 are used, so a signed conversion, the cheapest one, is enough.
template <class T, class UInt>
FASTVAE_INLINE T minus_one_from_word(UInt word, float) {
  const T complement = to_real(bit_cast<typename Traits<T>::Int>(~word));
  return multiply_add(complement, T(-2.3283064365386963e-10f), T(-1.1641532182693481e-10f));  // 2^-32, 2^-33
}
template <class T, class UInt>
FASTVAE_INLINE T minus_one_from_word(UInt word, double) {
  return number_from_word<T>(~word, double()) * T(-1.1102230246251565e-16);  // 2^-53
}

// A signed fraction of a quarter turn, in radians: from -pi / 4 to pi / 4.
template <class T>
FASTVAE_INLINE T angle_from_fraction(typename Traits<T>::Int fraction, float) {
  return to_real(fraction) * T(3.6572951981678995e-10f);  // 2 pi / 2^34
}
template <class T>
FASTVAE_INLINE T angle_from_fraction(typename Traits<T>::Int fraction, double) {
  return to_real(fraction >> 13) * T(6.9757369960172635e-16);  // 2 pi / 2^53
}

// Two standard normals: radius sqrt(-2 ln u) from one word, angle from another. u lies in (0, 1] and uses all bits of
// its word, near 1 as well as near 0. The angle's quadrant is split off in integers, exactly, before sine and cosine.
template <class T, class UInt>
FASTVAE_INLINE void box_muller(UInt radius_word, UInt angle_word, T& first, T& second) {
  using S = ScalarOf<T>;
  using Int = typename Traits<T>::Int;
  constexpr int kBits = 8 * sizeof(S), kDigits = sizeof(S) == 4 ? 32 : 53;
  const T log_u =
      logarithm_of_fraction<kDigits>(number_from_word<T>(radius_word, S()), minus_one_from_word<T>(radius_word, S()));
  const T radius = square_root(log_u * T(S(-2)));
  // The word is a number of quarter turns, rounded to the nearest, plus a signed rest: the bits below the top two.
  T sine, cosine;
  sine_cosine(angle_from_fraction<T>(bit_cast<Int>(angle_word << 2), S()), sine, cosine);
  const UInt rounded = angle_word + (UInt(1) << (kBits - 3));  // the quadrant in the top two bits
  const UInt top = UInt(1) << (kBits - 1), next = UInt(1) << (kBits - 2);
  const auto swap = (rounded & next) != UInt(0);
  // cos is negative in quadrants 1 and 2, sin in 2 and 3.
  first = bit_cast<T>(bit_cast<UInt>(radius * select(swap, sine, cosine)) ^ ((rounded + next) & top));
  second = bit_cast<T>(bit_cast<UInt>(radius * select(swap, cosine, sine)) ^ (rounded & top));
}

FASTVAE_NAMESPACE_END
