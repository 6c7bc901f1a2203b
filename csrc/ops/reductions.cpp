#include "reductions.h"

#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

namespace fastvae {

c10::SymInt divisor(Reduction r, const Tensor& like) {
  if (r == Reduction::batchmean || r == Reduction::latent || r == Reduction::channel) return like.sym_size(0);
  return r == Reduction::mean ? like.sym_numel() : c10::SymInt(1);
}

double divisor_value(Reduction r, const Tensor& like) {
  return static_cast<double>(divisor(r, like).guard_int(__FILE__, __LINE__));
}

Tensor weight_sum(Reduction r, const Tensor& weight, const Tensor& like) {
  if (r != Reduction::mean || !weight.defined()) return {};
  const Tensor sum = weight.sum(at::kDouble);
  if (weight.sym_sizes() == like.sym_sizes()) return sum;
  c10::SymInt repeats = 1;
  for (int64_t d = 1; d <= like.dim(); ++d) {
    if (d > weight.dim() || weight.sym_size(-d) == 1) repeats = repeats * like.sym_size(-d);
  }
  return at::mul(sum, at::Scalar(repeats));
}

at::ScalarType result_type(const Tensor& like) { return like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor empty_result(Reduction r, const Tensor& like) {
  const auto options = like.options().dtype(result_type(like));
  if (is_sample(r)) return at::empty_symint(like.sym_sizes().slice(0, batch_dims(r)), options);
  switch (r) {
    case Reduction::none:
      return at::empty_like(like, options);
    case Reduction::channel:
      return at::empty_symint({like.sym_size(1)}, options);
    case Reduction::latent:
      return at::empty_symint(like.sym_sizes().slice(1), options);
    default:
      return at::empty({}, options);
  }
}

Tensor unreduced(const Tensor& result, Reduction r, const Tensor& like) {
  if (!result.defined() || r == Reduction::none || r == Reduction::latent || is_scalar(r)) return result;
  std::vector<c10::SymInt> shape(like.dim(), 1);
  if (is_sample(r)) {
    for (int64_t d = 0; d < batch_dims(r); ++d) shape[d] = like.sym_size(d);
  } else {
    shape[1] = like.sym_size(1);
  }
  return result.reshape_symint(shape);
}

Sums sums_of(const Tensor& result, Reduction r, const Tensor& like) {
  Sums sums;
  sums.divisor = divisor_value(r, like);
  if (!result.defined() || !(is_scalar(r) || is_sample(r))) return sums;
  sums.data = result.data_ptr();
  sums.float64 = result.scalar_type() == at::kDouble;
  if (is_sample(r)) {
    sums.count = result.numel();
    sums.event = sums.count > 0 ? like.numel() / sums.count : 0;
  }
  return sums;
}

Tensor spread(const Tensor& g, Reduction r, const Tensor& like, const Tensor& weight) {
  const Tensor factor = unreduced(g, r, like);
  if (const Tensor sum = weight_sum(r, weight, like); sum.defined())
    return at::div(factor, sum).to(factor.scalar_type());
  if (r == Reduction::sum || r == Reduction::none || is_sample(r)) return factor;
  return at::div(factor, at::Scalar(divisor(r, like)));
}

Tensor reduced(const Tensor& value, Reduction r, const Tensor& weight) {
  if (!value.defined() || r == Reduction::none) return value;
  std::vector<int64_t> over;
  for (int64_t d = 0; d < value.dim(); ++d) {
    const bool kept = is_sample(r)              ? d < batch_dims(r)
                      : r == Reduction::channel ? d == 1
                                                : r == Reduction::latent && d > 0;
    if (!kept) over.push_back(d);
  }
  const Tensor sum = over.empty() ? value : value.sum(over);
  if (const Tensor weights = weight_sum(r, weight, value); weights.defined())
    return at::div(sum, weights).to(value.scalar_type());
  if (r == Reduction::sum || is_sample(r)) return sum;
  return at::div(sum, at::Scalar(divisor(r, value)));
}

Tensor widened(const Tensor& t, at::ScalarType least) {
  return t.scalar_type() == at::kDouble || t.scalar_type() == least ? t : t.to(least);
}

}  // namespace fastvae
