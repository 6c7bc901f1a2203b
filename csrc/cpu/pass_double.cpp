// pass.h in double: a file for itself, so that the two compile side by side.
#include "pass.h"

FASTVAE_NAMESPACE_BEGIN

template void pass_in<double>(const PassArgs&, int64_t, int64_t, int64_t, double*, double*);

FASTVAE_NAMESPACE_END
