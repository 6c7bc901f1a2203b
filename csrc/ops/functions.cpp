// An op for the tests: single functions of csrc/math.
#include "../cpu/functions.h"

#include <ATen/ops/empty_like.h>

#include <string>

#include "../cpu/kernels.h"
#include "autograd.h"

namespace fastvae {
namespace {

// function(x[i], ...) for the elements of contiguous tensors, on the CPU.
Tensor elementary(c10::string_view function, at::TensorList x) {
  TORCH_CHECK_VALUE(!x.empty() && x.size() <= 3, "fastvae.elementary: needs 1 to 3 arguments, but got ", x.size());
  const void* data[3] = {};
  for (size_t k = 0; k < x.size(); ++k) {
    TORCH_CHECK_VALUE(x[k].is_cpu() && x[k].is_contiguous() && x[k].sizes() == x[0].sizes() &&
                          x[k].scalar_type() == x[0].scalar_type() &&
                          (x[k].dtype() == at::kFloat || x[k].dtype() == at::kDouble),
                      "fastvae.elementary: needs contiguous float32 or float64 tensors of one shape on the CPU");
    data[k] = x[k].const_data_ptr();
  }
  Tensor out = at::empty_like(x[0]);
  const cpu::Functions compute = FASTVAE_BEST(cpu::functions);
  const std::string name(function);
  TORCH_CHECK_VALUE(compute(name.c_str(), x[0].dtype() == at::kDouble, data, out.mutable_data_ptr(), out.numel()),
                    "fastvae.elementary: there is no function ", name);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def("elementary(str function, Tensor[] x) -> Tensor", kPure);
  m.impl("elementary", torch::dispatch(c10::DispatchKey::CPU, elementary));
}

}  // namespace fastvae
