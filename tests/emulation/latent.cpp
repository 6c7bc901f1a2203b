#include "../../csrc/cuda/latent.cu"

#include "../../csrc/cuda/latent_bfloat16.cu"
#include "../../csrc/cuda/latent_float16.cu"
#include "../../csrc/cuda/latent_float32.cu"
#include "../../csrc/cuda/latent_float64.cu"
