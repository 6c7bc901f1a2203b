// philox.h on vectors: normals for a run of elements.
#pragma once

#include "../math/philox.h"
#include "vec.h"

FASTVAE_NAMESPACE_BEGIN

// One Philox call for each lane. Together they give kSize normals.
template <class T>
struct Group;

// The counters of the 64-bit lanes. Lane l of the normals has the counter (l % kPer) * (kLanes / kPer) + l / kPer,
// where kPer normals fill 128 bits. Then interleaving within 128 bits, which every instruction set has, puts the
// normals into the order of the elements.
template <int kLanes, int kPer, int kStep>
struct LaneCounters {
  uint64_t counter[kLanes / kStep];
  constexpr LaneCounters() : counter() {
    for (int l = 0; l < kLanes; l += kStep) counter[l / kStep] = l % kPer * (kLanes / kPer) + l / kPer;
  }
};

template <>
struct Group<float> {
  static constexpr int kLanes = Vec<float>::kLanes, kPerCounter = 4, kSize = kPerCounter * kLanes;
  using Words = Vec<uint32_t>[4];

  static FASTVAE_INLINE void draw(uint64_t seed, uint64_t offset, uint64_t counter, Words& words) {
    using U64 = Vec<uint64_t>;
    static constexpr LaneCounters<kLanes, 4, 2> kEven;  // lanes 0, 2, 4, ...
    U64 even[4], odd[4];                                // a 32-bit word in each 64-bit lane
    even[0] = U64::load(kEven.counter) + U64(counter);
    odd[0] = even[0] + U64(kLanes / 4);
    even[1] = even[0] >> 32;
    odd[1] = odd[0] >> 32;
    even[2] = odd[2] = U64(offset);
    even[3] = odd[3] = U64(offset >> 32);
    philox4x32_10(even, seed);
    philox4x32_10(odd, seed);
    FASTVAE_UNROLL
    for (int j = 0; j < 4; ++j) words[j] = bit_cast<Vec<uint32_t>>((even[j] & U64(0xffffffffu)) | (odd[j] << 32));
  }
  static FASTVAE_INLINE void normals(const Words& words, float* out) {
    Vec<float> e[4];
    box_muller(words[0], words[1], e[0], e[1]);
    box_muller(words[2], words[3], e[2], e[3]);
    // A 4 x 4 transposition within each 128 bits.
    const auto a = interleave<false>(e[0], e[2]), b = interleave<true>(e[0], e[2]);
    const auto c = interleave<false>(e[1], e[3]), d = interleave<true>(e[1], e[3]);
    interleave<false>(a, c).store(out);
    interleave<true>(a, c).store(out + kLanes);
    interleave<false>(b, d).store(out + 2 * kLanes);
    interleave<true>(b, d).store(out + 3 * kLanes);
  }
};

template <>
struct Group<double> {
  static constexpr int kLanes = Vec<double>::kLanes, kPerCounter = 2, kSize = kPerCounter * kLanes;
  using Words = Vec<uint64_t>[2];

  static FASTVAE_INLINE void draw(uint64_t seed, uint64_t offset, uint64_t counter, Words& words) {
    using U64 = Vec<uint64_t>;
    static constexpr LaneCounters<kLanes, 2, 1> kAll;
    U64 word[4];
    word[0] = U64::load(kAll.counter) + U64(counter);
    word[1] = word[0] >> 32;
    word[2] = U64(offset);
    word[3] = U64(offset >> 32);
    philox4x32_10(word, seed);
    const U64 low(0xffffffffu);
    words[0] = (word[0] & low) | (word[1] << 32);
    words[1] = (word[2] & low) | (word[3] << 32);
  }
  static FASTVAE_INLINE void normals(const Words& words, double* out) {
    Vec<double> first, second;
    box_muller(words[0], words[1], first, second);
    interleave<false>(first, second).store(out);
    interleave<true>(first, second).store(out + kLanes);
  }
};

// The normals of elements [start, start + n), 512 at a time: first their random words, then the normals. The two loops
// are short, so the processor overlaps several iterations, which hides the latency of their long chains.
template <class T>
__attribute__((noinline)) void fill_normal(uint64_t seed, uint64_t offset, uint64_t start, int n, T* out) {
  using G = Group<T>;
  constexpr int kGroups = 512 / G::kSize;
  typename G::Words words[kGroups];
  uint64_t counter = start / G::kPerCounter;
  int skip = static_cast<int>(start % G::kPerCounter);
  while (n > 0) {
    const int groups = n + skip >= kGroups * G::kSize ? kGroups : (n + skip + G::kSize - 1) / G::kSize;
    for (int g = 0; g < groups; ++g) G::draw(seed, offset, counter + g * (G::kSize / G::kPerCounter), words[g]);
    for (int g = 0; g < groups; ++g) {
      if (skip == 0 && n >= G::kSize) {
        G::normals(words[g], out);
        out += G::kSize;
        n -= G::kSize;
        continue;
      }
      alignas(64) T ragged[G::kSize];
      G::normals(words[g], ragged);
      for (int j = skip; j < G::kSize && n > 0; ++j, --n) *out++ = ragged[j];
      skip = 0;
    }
    counter += static_cast<uint64_t>(groups) * (G::kSize / G::kPerCounter);
  }
}

FASTVAE_NAMESPACE_END
