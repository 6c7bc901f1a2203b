// How a kernel sees a tensor: no torch type, so that the kernels compile in seconds and for any compiler.
#pragma once

#include <cstdint>

namespace fastvae {

enum class DType : int { float32, float64, bfloat16, float16 };

constexpr int kMaxDims = 16;

// A tensor's elements in the logical (row-major) order that all operands of a kernel share. Dimensions that lie behind
// one another in memory are merged: a contiguous tensor has one dimension of stride 1, half a chunk(2, 1) has two.
struct View {
  void* data = nullptr;  // nullptr: the kernel does without this operand
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements; 0 where expanded
};

}  // namespace fastvae
