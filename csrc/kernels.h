// The arguments of the kernels, on either device. They have no torch types, so that the kernels compile in seconds and
// with any compiler. All pointers are to memory of the device that runs the kernel.
#pragma once

#include "math/config.h"

namespace fastvae {

// Tensors of integers are only read, never written: they are data.
enum class DType : int { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

constexpr int kMaxDims = 8;
constexpr int kMaxInputs = 5;   // of a formula
constexpr int kMaxNumbers = 3;  // a formula's constants

// A tensor's elements in the logical (row-major) order that all operands of a kernel share. Dimensions without gaps
// between them are merged: a contiguous tensor has one dimension of stride 1, one half of a chunk(2, 1) has two.
struct View {
  void* data = nullptr;  // nullptr: the operand is absent
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements; 0 where expanded
};

// The number of elements of a folded result (PassArgs); 0 if the result is not folded.
FASTVAE_INLINE int64_t folded_size(const View& view) {
  bool folded = false;
  int64_t size = 1;
  for (int d = 0; view.data != nullptr && d < view.dims; ++d) {
    if (view.stride[d] == 0 && view.size[d] != 1) {
      folded = true;
    } else {
      size *= view.size[d];
    }
  }
  return folded ? size : 0;
}

// A 0-dim tensor. If it is absent, its value counts as 1.
struct Number {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

// The seed and offset of the noise, by value or from the device's memory: a CUDA graph's replays change them there, and
// a backward pass reads what the forward pass kept there.
struct Noise {
  uint64_t seed = 0, offset = 0;
  const int64_t *seed_at = nullptr, *offset_at = nullptr;  // if present: replaces `seed`, is added to `offset`
  int64_t* keep = nullptr;                                 // CUDA: where to write seed and offset for the backward pass
};
FASTVAE_INLINE uint64_t seed_of(const Noise& noise) {
  return noise.seed_at == nullptr ? noise.seed : static_cast<uint64_t>(*noise.seed_at);
}
FASTVAE_INLINE uint64_t offset_of(const Noise& noise) {
  return noise.offset + (noise.offset_at == nullptr ? 0 : static_cast<uint64_t>(*noise.offset_at));
}

// Where the sums of a pass go: one total, or one for each sample; each is divided by `divisor`.
struct Sums {
  void* data = nullptr;  // nullptr: not wanted
  bool float64 = false;  // else float32
  int64_t count = 1;     // number of sums: 1, or the number of samples
  int64_t event = 0;     // elements of a sample; 0: one sum of all
  double divisor = 1;
  Number divisor_at;  // a second divisor: the sum of the weights, for a weighted mean
};

// One pass over the elements of tensors of one shape. It computes a formula's value, its gradients, or both. If the
// inputs are mu and logvar, it can also draw a sample from that Gaussian. A result without data is not computed.
//
// A result (`value` or one of `d`) whose view has stride 0 in some dimension is folded: it is summed over that
// dimension. Examples are the gradient of a parameter that broadcasts, and values that are reduced to one per channel.
// The elements of a folded result fill memory without gaps, in some order. If gradients may be kept, the upstream
// gradient is a 0-dim tensor, seen with strides of 0. It multiplies a folded gradient after the sum was rounded to its
// dtype, so that a gradient kept from the forward pass and one computed later have the same bits. A pass with folded
// results has at most one sum. A pass that samples has transform and the clamp, but none of weight, numbers, constant,
// x_scale and floor.
struct PassArgs {
  int64_t numel = 0;
  bool float64 = false;      // arithmetic in double
  int formula = -1;          // its place in formulas/list.h; -1: the sample alone, with mu and logvar as inputs
  View in[kMaxInputs];       // in the formula's order
  View d[kMaxInputs];        // their gradients: scale * scale_at / sums.divisor_at * upstream * derivative
  double scale = 1;          // 1 / B for a batchmean
  Number scale_at;           // beta, if it is a tensor
  View upstream;             // the gradient of the result, seen as a tensor of the inputs' shape
  bool may_be_kept = false;  // the forward pass may make such gradients, with an upstream gradient of 1
  View value;                // the value of each element; if folded, it is divided by sums.divisor
  Sums sums;
  View weight;  // multiplies each element's value; an element of weight 0 is ignored, even if it is NaN
  double numbers[kMaxNumbers] = {};
  int transform = 0;       // the first input's Activation, or the Scale of a Gaussian's arguments: formulas/formula.h
  double constant = 0;     // added to each value
  double x_scale = 1;      // multiplies the data input
  double floor = 0;        // free bits, if above 0: a smaller value counts as `floor` and has the gradient 0
  bool has_clamp = false;  // clamps the posterior's logvar to [low, high]
  double low = 0, high = 0;

  FASTVAE_INLINE bool has_extras() const {  // formulas/element.h
    return weight.data != nullptr || transform != 0 || x_scale != 1 || constant != 0 || floor > 0 || has_clamp;
  }

  View z;       // forward: the sample
  View dz;      // backward: the gradient of the sample
  View eps;     // the noise, if the user gives it
  Noise noise;  // else the noise to draw
  View d_eps;
};

// A discretized mixture of logistics (formulas/logistic_mixture.h), as a user chooses it.
struct Mixture {
  int components = 10, channels = 3;  // 3, or 1
  double half_width = 0;              // of a bin, where x is in [-1, 1]
  double low = 0, high = 0;           // x < low is in the first bin, x > high in the last; both reach to infinity
  double least_log_scale = 0;         // smaller log-scales count as this
  double scale = 1, shift = 0;        // scale * x + shift is in [-1, 1]
};
FASTVAE_INLINE int parameters_of(const Mixture& m) { return m.components * (m.channels == 3 ? 10 : 3); }

// A pass over pixels: forward, backward, or drawing pictures z. Views are of the first channel of the parameters or x.
struct MixtureArgs : PassArgs {
  Mixture mixture;
  int64_t step[2] = {}, d_step[2] = {}, z_step = 0;  // elements from a channel of in, d or z to the next
};

struct NormalArgs {
  View out;
  Noise noise;
  uint64_t start = 0;  // index of the first element
};

// Tensors to be multiplied in place by one number.
struct ScaleArgs {
  static constexpr int kMost = 8;
  View tensor[kMost];
  int64_t numel[kMost];
  int count = 0;
  Number factor;
};

// loss = recon + beta * weight * kl, for each sum of a reconstruction and of a KL divergence.
struct Combination {
  void* loss = nullptr;  // nullptr: not wanted
  bool float64 = false;
  double beta = 1;
  Number weight;  // beta, if it is a tensor
};

}  // namespace fastvae
