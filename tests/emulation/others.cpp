#include "../../csrc/cuda/noise.cu"
#include "../../csrc/cuda/reduce.cu"
#include "../../csrc/cuda/scale.cu"
