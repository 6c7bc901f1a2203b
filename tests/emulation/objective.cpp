#include "../../csrc/cuda/objective.cu"

#include "../../csrc/cuda/objective_bfloat16.cu"
#include "../../csrc/cuda/objective_float16.cu"
#include "../../csrc/cuda/objective_float32.cu"
#include "../../csrc/cuda/objective_float64.cu"
