// Noise as tensors, and the scaling of kept gradients.
#include "noise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>

#include "../math/philox.h"
#include "autograd.h"
#include "views.h"

namespace fastvae {
namespace {

void fill(const Tensor& out, const Noise& noise, int64_t start = 0) {
  if (out.is_meta()) return;
  NormalArgs args;
  args.out = view_of(out);
  args.noise = noise;
  args.start = static_cast<uint64_t>(start);
  run_normal(out, args, out.numel());
}

// An uninitialised tensor for like's noise, in the type of the arithmetic.
Tensor empty_noise(const Tensor& like) { return at::empty_like(like, like.options().dtype(result_type(like))); }

Tensor philox_normal(c10::SymIntArrayRef size, int64_t seed, int64_t offset, int64_t start, at::ScalarType dtype,
                     at::Device device) {
  constexpr const char* kOp = "fastvae.random.philox_normal";
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, kOp,
                   ": dtype must be float32, float64, bfloat16 or float16, but got ", c10::getDtypeNames(dtype).first);
  TORCH_CHECK(device.is_cpu() || device.is_cuda() || device.is_meta(), kOp,
              ": device must be the CPU or a CUDA device, but got ", device, "; make it on the CPU and move it there");
#if !defined(FASTVAE_CUDA)
  TORCH_CHECK(!device.is_cuda(), kOp, ": device is ", device, ", but this fastvae was built without CUDA; ",
              kHowToGetCuda);
#endif
  Tensor out = at::empty_symint(size, at::TensorOptions(device).dtype(dtype));
  Noise noise;
  noise.seed = static_cast<uint64_t>(seed);
  noise.offset = static_cast<uint64_t>(offset);
  fill(out, noise, start);
  return out;
}

// Philox's ten rounds alone, for tests with known answers.
Tensor philox_words(at::IntArrayRef counter, at::IntArrayRef key) {
  TORCH_CHECK_VALUE(counter.size() == 4 && key.size() == 2,
                    "fastvae.philox_words: needs 4 counter words and 2 key words, but got ", counter.size(), " and ",
                    key.size());
  uint64_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = static_cast<uint32_t>(counter[i]);
  philox4x32_10(c, static_cast<uint64_t>(static_cast<uint32_t>(key[0])) | static_cast<uint64_t>(key[1]) << 32);
  Tensor words = at::empty({4}, at::kLong);
  for (int i = 0; i < 4; ++i) words.mutable_data_ptr<int64_t>()[i] = static_cast<uint32_t>(c[i]);
  return words;
}

// The noise of a state, for a tensor of like's shape.
Tensor noise(const Tensor& like, const Tensor& state) {
  Tensor out = empty_noise(like);
  fill(out, remembered(state));
  return out;
}

// New noise for a tensor of like's shape, for return_eps and for transforms (noise_for_transform).
Tensor normal_like(const Tensor& like, std::optional<at::Generator> generator, int64_t /*draw*/) {
  constexpr const char* kOp = "fastvae.reparameterize";
  check_tensor(kOp, "mu", like);
  check_noise(kOp, like, std::nullopt, generator);
  Tensor out = empty_noise(like);
  const Draw drawn = draw(like, generator);
  fill(out, drawn.noise);
  return out;
}

// Torch's own noise, on devices without kernels.
Tensor normal_like_elsewhere(const Tensor& like, std::optional<at::Generator> generator, int64_t /*draw*/) {
  check_tensor("fastvae.reparameterize", "mu", like);
  return torch_noise(like, generator);
}

Tensor normal_like_autograd(const Tensor& like, std::optional<at::Generator> generator, int64_t /*draw*/) {
  static const auto op = find_op<decltype(normal_like)>("fastvae::_normal_like");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(like, generator, next_draw(like));
}

}  // namespace

Tensor torch_noise(const Tensor& like, const std::optional<at::Generator>& generator) {
  const auto options = like.options().dtype(result_type(like));
  return generator.has_value() ? at::randn_symint(like.sym_sizes(), generator, options) : at::randn_like(like, options);
}

Tensor noise_of(const Tensor& like, const Tensor& state) {
  static const auto op = find_op<decltype(noise)>("fastvae::_noise");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(like, state);
}

Tensor noise_for_transform(const Tensor& like, const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(normal_like)>("fastvae::_normal_like");
  return op.call(like, generator, 0);
}

void scale_gradients(variable_list& gradients, const Tensor& g) {
  if (is_traced(g) || g.is_neg() || g._is_zerotensor()) {
    // Out of place, so that a tracer sees it, or since g's data are not stored as they are. In the kernel's arithmetic.
    for (Tensor& t : gradients) {
      if (t.defined()) t = (widened(t) * g.to(result_type(t))).to(t.scalar_type());
    }
    return;
  }
  if (g.is_meta()) return;
  if (g.dim() > 0) {
    for (Tensor& t : gradients) {
      if (t.defined()) t.mul_(g);
    }
    return;
  }
  ScaleArgs args;
  args.factor = number_of(g);
  for (const Tensor& t : gradients) {
    if (!t.defined() || t.numel() == 0) continue;
    TORCH_INTERNAL_ASSERT(args.count < ScaleArgs::kMost);
    args.tensor[args.count] = view_of(t, memory_order({t}, /*keep_batch=*/false));
    args.numel[args.count++] = t.numel();
  }
  run_scale(g, args);
}

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  m.def(
      "philox_normal(SymInt[] size, *, int seed, int offset=0, int start=0, ScalarType dtype, Device device) -> Tensor",
      kPure);
  m.def("philox_words(int[] counter, int[] key) -> Tensor", kPure);
  m.def("_normal_like(Tensor like, Generator? generator, int draw=0) -> Tensor", kRandom);
  m.def("_noise(Tensor like, Tensor state) -> Tensor", kPure);
  m.impl("philox_normal", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, philox_normal));
  m.impl("philox_words", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, philox_words));
  implement(m, "_normal_like", normal_like);
  implement_elsewhere(m, "_normal_like", normal_like_elsewhere);
  implement_inner(m, "_noise", noise);
}
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("_normal_like", normal_like_autograd); }

}  // namespace fastvae
