// Macros for the compilers that the formulas are written for: nvcc, and a C++ compiler for the CPU's kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#define FASTVAE_UNROLL _Pragma("unroll")
#else
#if !defined(FASTVAE_INLINE)
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#endif

// The CPU kernels are compiled once per instruction set. Each copy has its own inline namespace, so that the linker
// cannot use the code of one copy in another.
#ifndef FASTVAE_ISA
#define FASTVAE_ISA common
#endif

#define FASTVAE_NAMESPACE_BEGIN \
  namespace fastvae {           \
  inline namespace FASTVAE_ISA {
#define FASTVAE_NAMESPACE_END \
  }                           \
  }
