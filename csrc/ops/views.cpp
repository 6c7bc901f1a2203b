#include "views.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "checks.h"

namespace fastvae {
namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kFloat:
      return DType::float32;
    case at::kByte:
    case at::kBool:
      return DType::uint8;
    case at::kChar:
      return DType::int8;
    case at::kShort:
      return DType::int16;
    case at::kInt:
      return DType::int32;
    case at::kLong:
      return DType::int64;
    default:
      TORCH_INTERNAL_ASSERT(false, "fastvae: no kernel reads ", dtype_name(t), ", and no check has refused it");
  }
}

View merged(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  View view;
  view.data = const_cast<void*>(t.const_data_ptr());  // not data_ptr: that would copy a lazy clone that is only read
  view.dtype = dtype_of(t);
  // From the innermost dimension outwards. The order is reversed at the end.
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    const int last = view.dims - 1;
    if (last >= 0 && strides[d] == view.stride[last] * view.size[last]) {
      view.size[last] *= sizes[d];
      continue;
    }
    TORCH_CHECK_VALUE(view.dims < kMaxDims, "fastvae: a tensor of shape ", sizes, " and strides ", strides,
                      " has more than ", kMaxDims,
                      " dimensions that do not lie behind one another in memory; call .contiguous() on it first");
    view.size[view.dims] = sizes[d];
    view.stride[view.dims++] = strides[d];
  }
  if (view.dims == 0) {
    view.dims = 1;
    view.size[0] = view.stride[0] = 1;
  }
  std::reverse(view.size, view.size + view.dims);
  std::reverse(view.stride, view.stride + view.dims);
  return view;
}

View ordered(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef order) {
  if (order.empty()) return merged(t, sizes, strides);
  c10::SmallVector<int64_t, 8> permuted_sizes, permuted_strides;
  for (const int64_t d : order) {
    permuted_sizes.push_back(sizes[d]);
    permuted_strides.push_back(strides[d]);
  }
  return merged(t, permuted_sizes, permuted_strides);
}

}  // namespace

std::vector<int64_t> memory_order(at::ArrayRef<Tensor> operands, int64_t kept) {
  for (const Tensor& t : operands) {
    if (!t.defined()) continue;
    if (t.is_contiguous()) return {};
    bool expanded = false;
    for (int64_t d = 0; d < t.dim(); ++d) expanded |= t.stride(d) == 0 && t.size(d) > 1;
    if (expanded) continue;
    std::vector<int64_t> order(t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) order[d] = d;
    std::stable_sort(order.begin() + kept, order.end(),
                     [&](int64_t i, int64_t j) { return t.stride(i) > t.stride(j); });
    return order;
  }
  return {};
}

View view_of(const Tensor& t, at::IntArrayRef order) {
  return t.defined() ? ordered(t, t.sizes(), t.strides(), order) : View();
}

View view_of(const Tensor& t, const Tensor& like, at::IntArrayRef order) {
  if (!t.defined()) return View();
  if (t.sizes() == like.sizes()) return view_of(t, order);
  return view_of(t.expand(like.sizes()), order);
}

Number number_of(const Tensor& t) {
  Number number;
  if (!t.defined() || t.is_meta()) return number;
  number.data = t.const_data_ptr();
  number.dtype = dtype_of(t);
  return number;
}

}  // namespace fastvae
