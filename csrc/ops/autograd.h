// One autograd node for all ops. An op describes itself by
//
//   struct Op {
//     static constexpr const char* kName;
//     static constexpr int kInputs;  // tensors that may want a gradient
//     static constexpr int kSaved;   // tensors that the backward pass needs
//     // The gradients of the inputs that want one (the others undefined), from the outputs' gradients g (some may be
//     // undefined). `backward` runs the fused kernels, differentiable_backward aten ops, for second derivatives.
//     variable_list backward(const variable_list& g, const std::array<Tensor, kSaved>&, const Wants<kInputs>&) const;
//     variable_list differentiable_backward(... the same ...) const;
//     auto options() const;  // a tuple of everything else that the backward pass depends on
//     // Only if gradients of results that are no scalars are kept: g in a shape that broadcasts to the inputs.
//     Tensor factor(const Tensor& g, const Tensor& input) const;
//     // Only if numbers change between calls: makes them saved tensors, for a compiled backward pass.
//     void lift_numbers(std::array<SavedVariable, kSaved>&);
//   };
//
// The node is written by hand, since torch.func refuses torch::autograd::Function.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <mutex>
#include <tuple>

#include "pass.h"

namespace fastvae {

using torch::autograd::variable_list;

// Of tensors that may be undefined.
inline Tensor sum(const Tensor& a, const Tensor& b) {
  return a.defined() && b.defined() ? a + b : (a.defined() ? a : b);
}

// ---- Registration.

inline const std::vector<at::Tag> kPure{at::Tag::pt2_compliant_tag};
inline const std::vector<at::Tag> kRandom{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};

// One function for all devices, so that Meta tensors get the shapes of real ones. (Without CUDA, check_tensor raises.)
template <class Function>
void implement(torch::Library& m, const char* name, Function* function) {
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
    m.impl(name, torch::dispatch(key, function));
  }
}

// On devices without kernels the op is a function of aten ops, which autograd differentiates. check_tensor warns.
template <class Function>
void implement_elsewhere(torch::Library& m, const char* name, Function* function) {
  using c10::DispatchKey;
  for (const auto key : {DispatchKey::MPS, DispatchKey::AutogradMPS, DispatchKey::XPU, DispatchKey::AutogradXPU,
                         DispatchKey::HPU, DispatchKey::AutogradHPU, DispatchKey::MTIA, DispatchKey::AutogradMTIA,
                         DispatchKey::PrivateUse1, DispatchKey::AutogradPrivateUse1}) {
    m.impl(name, torch::dispatch(key, function));
  }
}

// An op that only the autograd kernels call. Differentiating through the op itself raises an error.
template <class Function>
void implement_inner(torch::Library& m, const char* name, Function* function) {
  implement(m, name, function);
  m.impl(name, torch::dispatch(c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback()));
}

template <class Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Whether a call is traced or wrapped (torch.compile, torch.func, a tensor subclass) and not run.
inline bool is_traced(const Tensor& t) { return at::isTensorSubclassLike(t); }

// Whether a transform of torch.func (or a batched backward) must see the ops that run. Then only aten ops may run.
inline bool is_batched(const Tensor& t) {
  return t.defined() &&
         t.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}
inline bool has_tangent(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool is_transformed(const Tensor& t) {
  return t.defined() && (t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) || has_tangent(t));
}

// For a random op's `draw` argument: AOTAutograd merges equal calls, even random ones, so each traced call must differ.
inline int64_t next_draw(const Tensor& t) {
  static std::atomic<int64_t> draws{0};
  return is_traced(t) ? ++draws : 0;
}

// ---- The node.

// Multiplies gradients, made for an upstream gradient of 1, by the real one, which broadcasts to them (noise.cpp).
void scale_gradients(variable_list& gradients, const Tensor& g);

// Whether gradients may be made in the forward pass and kept for the backward pass. float16 gradients would underflow
// before the loss scale reaches them. With hooks on saved tensors (checkpointing, offloading), only the inputs may be
// kept. torch.func always differentiates the backward pass, so it would never use kept gradients.
inline bool may_keep_gradients(at::ArrayRef<Tensor> of) {
  for (const Tensor& t : of) {
    if (t.defined() && t.requires_grad() && t.scalar_type() == at::kHalf) return false;
    if (is_transformed(t)) return false;
  }
  return !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// For lift_numbers: saves `numbers` as a tensor.
inline void lift(torch::autograd::SavedVariable& saved, at::ArrayRef<double> numbers) {
  if (saved.unpack().defined()) return;
  saved = torch::autograd::SavedVariable(at::tensor(numbers, at::kDouble), /*is_output=*/false);
}

template <class Op, class = void>
struct HasNumbers : std::false_type {};
template <class Op>
struct HasNumbers<Op, std::void_t<decltype(&Op::lift_numbers)>> : std::true_type {};

template <class Op, class = void>
struct HasFactor : std::false_type {};
template <class Op>
struct HasFactor<Op, std::void_t<decltype(&Op::factor)>> : std::true_type {};

template <class Op>
class FusedBackward final : public torch::autograd::Node {
 public:
  Op op;
  std::array<torch::autograd::SavedVariable, Op::kSaved> saved;
  // Gradients made in the forward pass, for an upstream gradient of 1 of the first output and none of the others.
  // Empty, or one for each input (undefined where none is wanted).
  variable_list kept;

  std::string name() const override { return Op::kName; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
    kept.clear();
  }

  // For compiled autograd. compiled_args collects what its graph depends on. apply_with_saved runs the backward pass on
  // stand-ins for the saved tensors, for a tracer. It uses no kept gradients: the graph also serves calls without them.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    if constexpr (HasNumbers<Op>::value) {
      auto& self = const_cast<FusedBackward&>(*this);
      self.op.lift_numbers(self.saved);
    }
    args.collect(name());
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, op.options());
    for (const auto& variable : saved) args.collect(variable, /*is_output=*/false);
  }
  variable_list apply_with_saved(const variable_list& g, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      kept.clear();
    }
    for (auto& variable : saved) swap.before(variable);
    variable_list gradients = apply(variable_list(g));
    for (auto& variable : saved) swap.after(variable);
    return gradients;
  }

 protected:
  variable_list apply(variable_list&& g) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list none(Op::kInputs);
    const auto is_defined = [](const Tensor& t) { return t.defined(); };
    if (std::none_of(g.begin(), g.end(), is_defined)) return none;
    Wants<Op::kInputs> wants;
    for (int i = 0; i < Op::kInputs; ++i) wants[i] = task_should_compute_output(i);

    const auto needs_aten = [](const Tensor& t) { return is_batched(t) || has_tangent(t); };
    const bool differentiable = at::GradMode::is_enabled() || std::any_of(g.begin(), g.end(), needs_aten);
    if (!kept.empty() && !differentiable && g[0].defined() && std::none_of(g.begin() + 1, g.end(), is_defined)) {
      // The first backward pass takes the kept gradients, so that no other scales them again. Later ones recompute.
      variable_list taken = std::move(kept);
      kept.clear();
      for (int i = 0; i < Op::kInputs; ++i) {
        if (!wants[i]) taken[i] = Tensor();
      }
      if constexpr (HasFactor<Op>::value) {
        scale_gradients(taken, op.factor(g[0], saved[0].unpack(this_node())));
      } else {
        scale_gradients(taken, g[0]);
      }
      return taken;
    }
    std::array<Tensor, Op::kSaved> tensors;
    for (int i = 0; i < Op::kSaved; ++i) tensors[i] = saved[i].unpack(this_node());
    if (differentiable || std::any_of(tensors.begin(), tensors.end(), needs_aten)) {
      return op.differentiable_backward(g, tensors, wants);
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return op.backward(g, tensors, wants);
  }

 private:
  auto this_node() {
    using Pointer = decltype(torch::autograd::Edge::function);
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
      return this->shared_from_this();
    } else {
      return this->getptr();
    }
  }
};

// A node is held by intrusive_ptr from torch 2.13 on, by shared_ptr before.
template <class N, class Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>();
  }
}

// The node of one call, with an edge to each input.
template <class Op>
auto record(Op op, const std::array<Tensor, Op::kInputs>& inputs, const std::array<Tensor, Op::kSaved>& saved,
            variable_list kept = {}) {
  auto node = make_node<FusedBackward<Op>>();
  torch::autograd::edge_list edges(Op::kInputs);
  for (int i = 0; i < Op::kInputs; ++i) {
    if (inputs[i].defined() && inputs[i].requires_grad()) edges[i] = torch::autograd::impl::gradient_edge(inputs[i]);
  }
  node->set_next_edges(std::move(edges));
  node->op = std::move(op);
  for (int i = 0; i < Op::kSaved; ++i) node->saved[i] = torch::autograd::SavedVariable(saved[i], /*is_output=*/false);
  node->kept = std::move(kept);
  return node;
}

template <size_t N>
Wants<N> wanted(const std::array<Tensor, N>& inputs) {
  Wants<N> wants;
  for (size_t i = 0; i < N; ++i) wants[i] = inputs[i].defined() && inputs[i].requires_grad();
  return wants;
}

// ---- Forward mode: a result's tangent is the sum of its inputs' tangents times its derivatives (composed.h).

// The tangents of the inputs, undefined where there is none.
template <size_t N>
std::array<Tensor, N> tangents_of(const std::array<Tensor, N>& inputs) {
  std::array<Tensor, N> tangents;
  for (size_t i = 0; i < N; ++i) {
    if (has_tangent(inputs[i])) tangents[i] = inputs[i]._fw_grad(/*level=*/0);
  }
  return tangents;
}

template <size_t N>
bool any_defined(const std::array<Tensor, N>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined(); });
}

inline void set_tangent(const Tensor& result, const Tensor& tangent) {
  if (tangent.defined()) result._set_fw_grad(tangent.to(result.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}

// The schema of an op cannot return absent gradients, so an op returns only those that are wanted. placed() makes a
// list of them with one place for each input.
inline std::vector<Tensor> defined_only(at::ArrayRef<Tensor> tensors) {
  std::vector<Tensor> list;
  for (const Tensor& t : tensors) {
    if (t.defined()) list.push_back(t);
  }
  return list;
}
template <size_t N>
variable_list placed(const std::vector<Tensor>& wanted, const std::array<bool, N>& wants) {
  variable_list all(N);
  size_t next = 0;
  for (size_t i = 0; i < N; ++i) {
    if (wants[i]) all[i] = wanted[next++];
  }
  return all;
}

}  // namespace fastvae
