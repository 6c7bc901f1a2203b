#include "../../csrc/cuda/logistic_mixture.cu"
#include "../../csrc/cuda/noise.cu"
#include "../../csrc/cuda/pass.cu"
#include "../../csrc/cuda/scale.cu"
