// The module _C: loading it registers the ops with torch; what it offers itself is how it was built.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py
#include "cpu/kernels.h"

#define FASTVAE_STRING(x) #x
#define FASTVAE_EXPANDED(x) FASTVAE_STRING(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of fastvae, registered as torch.ops.fastvae.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["commit"] = FASTVAE_COMMIT;
    info["torch"] = FASTVAE_TORCH;
    info["compiler"] = FASTVAE_COMPILER;
    info["cuda"] = FASTVAE_CUDA_VERSION;
    info["cuda_archs"] = FASTVAE_CUDA_ARCHS;
    info["cpu_kernels"] = FASTVAE_CPU_KERNELS;
#if defined(_OPENMP)
    info["openmp"] = FASTVAE_EXPANDED(_OPENMP);
#else
    info["openmp"] = "no: one thread";
#endif
    return info;
  });
  m.def("cpu_capability", &fastvae::cpu::capability, "The instruction set that the CPU kernels use in this process.");
}
