// A file of its own: what blocks share is another kind of section here than in the passes.
#include "../../csrc/pairwise/pairwise.cu"
