// Functions that describe the library. Loading it registers the ops with torch. It does not use Python's C API, so that
// one build serves every version of Python.
#include "build_info.h"  // written by setup.py
#include "cpu/kernels.h"

#define FASTVAE_STRING(x) #x
#define FASTVAE_EXPANDED(x) FASTVAE_STRING(x)
#if defined(_OPENMP)
#define FASTVAE_OPENMP FASTVAE_EXPANDED(_OPENMP)
#else
#define FASTVAE_OPENMP "no: one thread"
#endif
#define FASTVAE_EXPORT extern "C" __attribute__((visibility("default")))

// How it was built, in JSON.
FASTVAE_EXPORT const char* fastvae_build_info() {
  return "{" FASTVAE_BUILD_INFO ", \"openmp\": \"" FASTVAE_OPENMP "\"}";
}

// The instruction set that the CPU kernels use in this process.
FASTVAE_EXPORT const char* fastvae_cpu_capability() { return fastvae::cpu::capability(); }
