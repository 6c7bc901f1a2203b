// What the formulas need from the compiler that includes them: a C++ compiler for the CPU (once per instruction set) or
// nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#define FASTVAE_UNROLL _Pragma("unroll")
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#endif

// The CPU kernels are compiled once per instruction set. Each copy lives in an inline namespace of its own, so that the
// linker can never give one of them the code of another.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA common
#endif

#define FASTVAE_NAMESPACE_BEGIN \
  namespace fastvae {           \
  inline namespace FASTVAE_ISA {
#define FASTVAE_NAMESPACE_END \
  }                           \
  }
