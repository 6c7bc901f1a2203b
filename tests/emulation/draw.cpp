// ops/draw.cpp, where the CPU's tensors take the code for CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>

#include "../../csrc/ops/device.h"

#define FASTVAE_CUDA
#define is_cuda is_cpu

#include "../../csrc/ops/draw.cpp"
