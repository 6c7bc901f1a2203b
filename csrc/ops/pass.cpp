#include "pass.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "views.h"

namespace fastvae {
namespace {

// An uninitialised gradient, with the input's layout; contiguous if the input broadcasts.
Tensor empty_gradient(bool wanted, const Tensor& of, const Tensor& like) {
  if (!wanted) return {};
  return of.sym_sizes() == like.sym_sizes() ? at::empty_like(of) : at::empty_symint(of.sym_sizes(), of.options());
}

}  // namespace

Pass prepare(const PassCall& call) {
  const Tensor& like = call.in[0].defined() ? call.in[0] : call.in[1];
  const Loss& loss = call.loss;
  const Reduction reduction = loss.reduction;
  const bool sample = call.want_z || call.dz.defined();
  Pass pass;
  if (call.want_z) {
    const auto dtype = c10::promoteTypes(call.in[0].scalar_type(), call.in[1].scalar_type());
    pass.z = at::empty_like(like, like.options().dtype(dtype));
  }
  if (call.want_value) pass.value = empty_result(reduction, like);
  for (int i = 0; i < kMaxInputs; ++i) pass.d[i] = empty_gradient(call.wants[i], call.in[i], like);
  pass.d_eps = empty_gradient(call.want_d_eps, call.eps, like);
  if (like.is_meta()) return pass;
  if (like.sym_numel() == 0) {  // no kernel writes a sum over no elements
    for (const Tensor& d : pass.d) {
      if (d.defined()) d.zero_();
    }
    if (call.want_value) pass.value.fill_(0 / divisor_value(reduction, like));
  }

  // Noise is drawn for the elements in their logical order. A pass without noise may go in the order of memory.
  const bool draws = sample && !call.eps.defined();
  const auto whole = [&](const Tensor& t) { return t.defined() && t.sizes() == like.sizes() ? t : Tensor(); };
  const auto order = draws ? std::vector<int64_t>()
                           : memory_order({whole(call.in[0]), whole(call.in[1]), call.dz},
                                          is_sample(reduction) ? batch_dims(reduction) : 0);
  const auto view = [&](const Tensor& t) { return view_of(t, like, order); };
  PassArgs& args = pass.args;
  args.numel = like.numel();
  args.float64 = like.scalar_type() == at::kDouble;
  for (int i = 0; i < kMaxInputs; ++i) {
    args.in[i] = view(call.in[i]);
    args.d[i] = view(pass.d[i]);
  }
  args.z = view(pass.z);
  args.dz = view(call.dz);
  args.eps = view(call.eps);
  args.noise = call.noise;
  args.d_eps = view(pass.d_eps);
  args.formula = static_cast<int>(loss.formula);
  args.transform = static_cast<int>(loss.transform);
  if (!loss.numbers.empty()) {
    args.low = loss.numbers[3];
    args.high = loss.numbers[4];
    args.has_clamp = std::isfinite(args.low) || std::isfinite(args.high);
  }
  if (loss.formula < 0) return pass;

  args.may_be_kept = !sample && is_scalar(reduction);
  args.scale = call.factor / divisor_value(reduction, like);
  args.scale_at = number_of(call.factor_at);
  args.sums = sums_of(pass.value, reduction, like);
  pass.alive = {unreduced(call.upstream, reduction, like), call.factor_at, weight_sum(reduction, call.weight, like)};
  args.upstream = view(pass.alive[0]);
  args.weight = view(call.weight);
  if (pass.alive[2].defined()) {
    args.sums.divisor_at = number_of(pass.alive[2]);
    args.sums.divisor = 1;
    args.scale = call.factor;
  }
  if (args.sums.data == nullptr) args.value = view(unreduced(pass.value, reduction, like));
  if (!loss.numbers.empty()) {
    args.constant = loss.numbers[0];
    args.x_scale = loss.numbers[1];
    args.floor = loss.numbers[2];
    std::copy(loss.numbers.begin() + kOwnNumbers, loss.numbers.end(), args.numbers);
  }
  return pass;
}

Pass run(const PassCall& call) {
  Pass pass = prepare(call);
  run_pass(call.in[1], pass.args);
  return pass;
}

}  // namespace fastvae
