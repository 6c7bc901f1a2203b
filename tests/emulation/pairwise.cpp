// A separate file: the shared variables of these kernels and of the passes need two kinds of section.
#include "../../csrc/pairwise/pairwise.cu"
