// philox.h on vectors: normals for a run of elements.
#pragma once

#include "../math/philox.h"
#include "vec.h"

FASTVAE_NAMESPACE_BEGIN

// Lane l of a group takes counter 4 (l % 4) + l / 4 (double: 4 (l % 2) + l / 2): then interleaving within 128 bits,
// which every instruction set has, puts the normals into the order of the elements. One group of normals from counter
// on: 64 floats.
FASTVAE_INLINE void normal_group(uint64_t seed, uint64_t offset, uint64_t counter, float* out) {
  using U64 = Vec<uint64_t>;
  using U32 = Vec<uint32_t>;
  static constexpr uint64_t kEven[] = {0, 8, 1, 9, 2, 10, 3, 11};  // counters of lanes 0, 2, 4, ...
  U64 even[4], odd[4];                                             // a 32-bit word in each 64-bit lane
  even[0] = U64::load(kEven) + U64(counter);
  odd[0] = even[0] + U64(4);
  even[1] = even[0] >> 32;
  odd[1] = odd[0] >> 32;
  even[2] = odd[2] = U64(offset);
  even[3] = odd[3] = U64(offset >> 32);
  philox4x32_10(even, seed);
  philox4x32_10(odd, seed);
  U32 word[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) word[j] = bit_cast<U32>((even[j] & U64(0xffffffffu)) | (odd[j] << 32));
  Vec<float> e[4];
  box_muller(word[0], word[1], e[0], e[1]);
  box_muller(word[2], word[3], e[2], e[3]);
  // A 4 x 4 transposition within each 128 bits.
  const auto a = interleave<false>(e[0], e[2]), b = interleave<true>(e[0], e[2]);
  const auto c = interleave<false>(e[1], e[3]), d = interleave<true>(e[1], e[3]);
  interleave<false>(a, c).store(out);
  interleave<true>(a, c).store(out + 16);
  interleave<false>(b, d).store(out + 32);
  interleave<true>(b, d).store(out + 48);
}

// 16 doubles.
FASTVAE_INLINE void normal_group(uint64_t seed, uint64_t offset, uint64_t counter, double* out) {
  using U64 = Vec<uint64_t>;
  static constexpr uint64_t kLanes[] = {0, 4, 1, 5, 2, 6, 3, 7};
  U64 word[4];
  word[0] = U64::load(kLanes) + U64(counter);
  word[1] = word[0] >> 32;
  word[2] = U64(offset);
  word[3] = U64(offset >> 32);
  philox4x32_10(word, seed);
  const U64 low(0xffffffffu);
  Vec<double> first, second;
  box_muller((word[0] & low) | (word[1] << 32), (word[2] & low) | (word[3] << 32), first, second);
  interleave<false>(first, second).store(out);
  interleave<true>(first, second).store(out + 8);
}

// The normals of elements [start, start + n).
template <class T>
__attribute__((noinline)) void fill_normal(uint64_t seed, uint64_t offset, uint64_t start, int n, T* out) {
  constexpr int kGroup = sizeof(T) == 4 ? 64 : 16, kPerCounter = sizeof(T) == 4 ? 4 : 2;
  for (int done = 0; done < n;) {
    const uint64_t i = start + done;
    const int skip = static_cast<int>(i % kPerCounter);
    if (skip == 0 && n - done >= kGroup) {
      normal_group(seed, offset, i / kPerCounter, out + done);
      done += kGroup;
      continue;
    }
    alignas(64) T group[kGroup];
    normal_group(seed, offset, i / kPerCounter, group);
    for (int j = skip; j < kGroup && done < n; ++j) out[done++] = group[j];
  }
}

FASTVAE_NAMESPACE_END
