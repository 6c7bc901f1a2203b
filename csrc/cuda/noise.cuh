// philox.h for one thread: the normals of one element or of a pack.
#pragma once

#include "../math/philox.h"
#include "memory.cuh"

namespace fastvae::cuda {

FASTVAE_DEVICE void keep(const Noise& noise, uint64_t seed, uint64_t offset) {
  if (noise.keep == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  noise.keep[0] = static_cast<int64_t>(seed);
  noise.keep[1] = static_cast<int64_t>(offset);
}

// Normals per Philox call: four floats or two doubles.
template <class T>
constexpr int kPerCounter = 16 / sizeof(T);

FASTVAE_DEVICE void draw(uint64_t seed, uint64_t offset, uint64_t counter, float (&normal)[4]) {
  uint64_t word[4];
  philox(seed, offset, counter, word);
  box_muller(static_cast<uint32_t>(word[0]), static_cast<uint32_t>(word[1]), normal[0], normal[1]);
  box_muller(static_cast<uint32_t>(word[2]), static_cast<uint32_t>(word[3]), normal[2], normal[3]);
}

FASTVAE_DEVICE void draw(uint64_t seed, uint64_t offset, uint64_t counter, double (&normal)[2]) {
  uint64_t word[4];
  philox(seed, offset, counter, word);
  const auto joined = [](uint64_t low, uint64_t high) { return (low & 0xffffffffu) | (high << 32); };
  box_muller(joined(word[0], word[1]), joined(word[2], word[3]), normal[0], normal[1]);
}

// The normals of the W elements from `first` on. `first` is a multiple of W.
template <class T, int W>
FASTVAE_DEVICE void draw_pack(uint64_t seed, uint64_t offset, int64_t first, T (&normal)[W]) {
  constexpr int kPer = kPerCounter<T>;
  T drawn[kPer];
  if constexpr (W == 1) {
    draw(seed, offset, static_cast<uint64_t>(first) / kPer, drawn);
    normal[0] = drawn[0];
    FASTVAE_UNROLL
    for (int j = 1; j < kPer; ++j) {
      if (first % kPer == j) normal[0] = drawn[j];  // an index would move the registers to memory
    }
  } else {
    static_assert(W % kPer == 0, "whole Philox calls");
    FASTVAE_UNROLL
    for (int k = 0; k < W / kPer; ++k) {
      draw(seed, offset, static_cast<uint64_t>(first) / kPer + k, drawn);
      FASTVAE_UNROLL
      for (int j = 0; j < kPer; ++j) normal[k * kPer + j] = drawn[j];
    }
  }
}

}  // namespace fastvae::cuda
