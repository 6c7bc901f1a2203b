// What the ops ask of the kernels, on either device: no torch type, so that the kernels compile in seconds and with any
// compiler. All pointers are to memory of the device that runs.
#pragma once

#include "math/config.h"

namespace fastvae {

// Integers are read only, as data.
enum class DType : int { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

constexpr int kMaxDims = 8;
constexpr int kMaxInputs = 5;   // of a formula
constexpr int kMaxNumbers = 3;  // a formula's constants

// A tensor's elements in the logical (row-major) order that all operands of a kernel share. Dimensions that lie behind
// one another in memory are merged: a contiguous tensor has one dimension of stride 1, half a chunk(2, 1) has two.
struct View {
  void* data = nullptr;  // nullptr: the kernel does without this operand
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements; 0 where expanded
};

// How many elements a result has, if it is folded (PassArgs); 0 if it is not.
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

// A 0-dim tensor. Without one, its value counts as 1.
struct Number {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

// Which noise: its seed and offset, by value or (on CUDA, where a graph's replays change them, and for a backward pass)
// from the device.
struct Noise {
  uint64_t seed = 0, offset = 0;
  const int64_t *seed_at = nullptr, *offset_at = nullptr;  // if there: instead of `seed`, and added to `offset`
  int64_t* keep = nullptr;                                 // CUDA: where to write both for the backward pass
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
  int64_t count = 1;     // of sums: 1, or one for each sample
  int64_t event = 0;     // elements of a sample; 0: one sum of all
  double divisor = 1;
  Number divisor_at;  // and by this: the sum of the weights, if the weighted mean is wanted
};

// One pass over the elements of some tensors of one shape: a formula's value, its gradients, or both, and beside them,
// where the inputs are mu and logvar, a sample from that Gaussian. What has no data is not wanted.
//
// A result (`value` or one of `d`) whose view has stride 0 in some dimension is folded: summed over that dimension, as
// the gradient of a parameter that broadcasts, or values that are reduced to one a channel. Its elements fill memory
// without gaps, in some order. Where gradients may be kept, the upstream gradient (then a 0-dim tensor, seen with
// strides of 0) multiplies a folded gradient after the sum was rounded to its dtype, so that a gradient kept from the
// forward pass and one made anew have the same bits. A pass with folded results has one sum or none. A pass that
// samples has none of the extras (weight, numbers, constant, x_scale, floor) but transform and the clamp.
struct PassArgs {
  int64_t numel = 0;
  bool float64 = false;      // arithmetic in double
  int formula = -1;          // its place in formulas/list.h; -1: the sample alone, with mu and logvar as inputs
  View in[kMaxInputs];       // in the formula's order
  View d[kMaxInputs];        // their gradients: scale * scale_at / sums.divisor_at * upstream * derivative
  double scale = 1;          // of a batchmean: 1 / B
  Number scale_at;           // beta, if it is a tensor
  View upstream;             // the gradient of the result, seen as a tensor of the inputs' shape
  bool may_be_kept = false;  // gradients of this kind are made in the forward pass, with an upstream gradient of 1
  View value;                // the values one by one (or summed over some dimensions, over sums.divisor)
  Sums sums;
  View weight;  // multiplies each element's value; an element of weight 0 counts for nothing, NaN included
  double numbers[kMaxNumbers] = {};
  int transform = 0;       // the first input's Activation, or the Scale of a Gaussian's arguments: formulas/formula.h
  double constant = 0;     // added to each value
  double x_scale = 1;      // multiplies the data input
  double floor = 0;        // if above 0: values below it count as it, and have no gradient (free bits)
  bool has_clamp = false;  // of the posterior's logvar, to
  double low = 0, high = 0;

  View z;       // the sample, or
  View dz;      // the gradient that reaches it
  View eps;     // given noise, or
  Noise noise;  // the noise to make
  View d_eps;
};

// A discretized mixture of logistics (formulas/logistic_mixture.h), as a user chooses it.
struct Mixture {
  int components = 10, channels = 3;  // 3, or 1
  double half_width = 0;              // of a bin, where x is in [-1, 1]
  double low = 0, high = 0;           // below and above them x is in the first or last bin, which reach to infinity
  double least_log_scale = 0;         // smaller ones count as it
  double scale = 1, shift = 0;        // scale * x + shift is in [-1, 1]
};
FASTVAE_INLINE int parameters_of(const Mixture& m) { return m.components * (m.channels == 3 ? 10 : 3); }

// A pass over pixels: its views are of tensors without their channels, in[0] of the parameters' first channel, in[1] of
// x's. Forward, backward, or drawing z, a picture.
struct MixtureArgs : PassArgs {
  Mixture mixture;
  int64_t step[2] = {}, d_step[2] = {}, z_step = 0;  // elements from a channel to the next, in in, d and z
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

// loss = recon + beta * kl, for each of the sums of a reconstruction and of a KL divergence.
struct Combination {
  void* loss = nullptr;  // nullptr: not wanted
  bool float64 = false;
  double beta = 1;  // times
  Number weight;    // beta, if it is a tensor
};

}  // namespace fastvae
