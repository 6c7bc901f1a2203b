// Folded results: sums of a pass's results over some dimensions, such as the gradient of a parameter that broadcasts.
// The elements are cut into slabs, boxes in all dimensions. A block works on one slab, tile by tile: it writes a tile's
// results to shared memory, adds them up there in a fixed order, and adds these sums to the slab's row of partial sums.
// finish() adds the rows. A row has places only for the sums that its slab contributes to.
#pragma once

#include "reduce.cuh"

namespace fastvae::cuda {

constexpr int64_t kMostSlabs = 512;

struct Folding {
  struct Result {
    void* data;
    DType dtype;
    int64_t numel;
    bool is_value;               // divided by the divisor
    uint32_t kept = 0;           // bit d: dimension d is not summed over
    int64_t begin = 0;           // where its sums begin in a row
    int64_t stride[kMaxDims]{};  // in memory, where the dimensions may have another order
  };
  int dims = 0, count = 0;
  int64_t size[kMaxDims], slab[kMaxDims];
  int tile[kMaxDims], along[kMaxDims];  // in each dimension: elements of a tile; number of slabs
  int64_t slabs = 0, width = 0;         // rows of partial sums, and their length
  Result result[kMaxFolded];
  Number upstream;  // multiplies the gradients after they are rounded

  FASTVAE_INLINE int64_t partials() const { return slabs * width; }
};

// Works on the block's slab. Calls pass.at(element, its index in the tile) for each element and returns the sum of the
// results, in the first thread. After the last barrier no thread reads a tile.
template <class Access, class Pass>
FASTVAE_DEVICE double fold_slab(const Folding& f, double* partials, Pass pass) {
  __shared__ int64_t origin[kMaxDims], left[kMaxDims];  // of the slab: its first index, its extent
  __shared__ int in_slab[kMaxDims], extent[kMaxDims];   // of the tile: its first index in the slab, its extent
  const int thread = static_cast<int>(threadIdx.x);
  double* const row = partials + int64_t(blockIdx.x) * f.width;
  for (int64_t i = thread; i < f.width; i += kThreads) row[i] = 0;
  if (thread == 0) {
    int index = static_cast<int>(blockIdx.x);
    for (int d = f.dims - 1; d >= 0; --d) {
      origin[d] = index % f.along[d] * f.slab[d];
      left[d] = min(f.slab[d], f.size[d] - origin[d]);
      in_slab[d] = 0;
      index /= f.along[d];
    }
  }
  double sum = 0;
  for (bool more = true; more;) {
    if (thread == 0) {
      for (int d = 0; d < f.dims; ++d) extent[d] = static_cast<int>(min(int64_t(f.tile[d]), left[d] - in_slab[d]));
    }
    __syncthreads();
    int count = 1;
    for (int d = 0; d < f.dims; ++d) count *= extent[d];
    for (int i = thread; i < count; i += kThreads) {
      int rest = i;
      int64_t element = 0, unit = 1;
      for (int d = f.dims - 1; d >= 0; --d) {
        const int above = rest / extent[d];
        element += (origin[d] + in_slab[d] + rest - above * extent[d]) * unit;
        unit *= f.size[d];
        rest = above;
      }
      sum += static_cast<double>(pass.at(element, i));
    }
    __syncthreads();
    for (int r = 0; r < f.count; ++r) {
      const auto* const values = Access::tile() + r * kTile;
      const uint32_t kept = f.result[r].kept;
      int outs = 1;
      for (int d = 0; d < f.dims; ++d) outs *= kept >> d & 1 ? extent[d] : 1;
      const int members = count / outs;
      int bits = 0;
      while (bits < kWarpBits && outs << (bits + 1) <= kThreads) ++bits;
      const int team = 1 << bits;                                    // threads for one sum
      for (int first = 0; first < outs; first += kThreads / team) {  // the same steps for all threads of a warp
        const int out = first + thread / team;
        double x = 0;
        int64_t place = f.result[r].begin;
        if (out < outs) {
          int base = 0, rest = out, unit = 1;
          int64_t slab_unit = 1;
          for (int d = f.dims - 1; d >= 0; --d) {
            if (kept >> d & 1) {
              const int index = rest % extent[d];
              base += index * unit;
              place += (in_slab[d] + index) * slab_unit;
              slab_unit *= f.slab[d];
              rest /= extent[d];
            }
            unit *= extent[d];
          }
          for (int m = thread % team; m < members; m += team) {
            int at = base;
            rest = m;
            unit = 1;
            for (int d = f.dims - 1; d >= 0; --d) {
              if (!(kept >> d & 1)) {
                at += rest % extent[d] * unit;
                rest /= extent[d];
              }
              unit *= extent[d];
            }
            x += static_cast<double>(values[at]);
          }
        }
        x = warp_sum(x, bits);
        if (out < outs && thread % team == 0) row[place] += x;
      }
    }
    more = false;  // to the next tile, along the last dimension first
    for (int d = f.dims - 1; d >= 0 && !more; --d) more = in_slab[d] + extent[d] < left[d];
    __syncthreads();
    if (thread == 0 && more) {
      int d = f.dims - 1;
      for (; in_slab[d] + extent[d] >= left[d]; --d) in_slab[d] = 0;
      in_slab[d] += extent[d];
    }
  }
  return group_sum(sum);
}

// A warp adds up the rows for the sum number `out` of a result, and writes it.
FASTVAE_DEVICE void finish_fold(const Folding& f, const Folding::Result& r, const double* partials, const Sums& sums,
                                int out) {
  int64_t place = r.begin, offset = 0, slab_unit = 1;
  int members = f.slabs > 0, slab = 0, unit = 1, rest = out;
  for (int d = f.dims - 1; d >= 0; --d) {
    if (r.kept >> d & 1) {
      const int size = static_cast<int>(f.size[d]), slab_size = static_cast<int>(f.slab[d]);
      const int index = rest % size;
      slab += index / slab_size * unit;
      place += index % slab_size * slab_unit;
      slab_unit *= slab_size;
      offset += index * r.stride[d];
      rest /= size;
    } else {
      members *= f.along[d];
    }
    unit *= f.along[d];
  }
  const int lane = threadIdx.x % kWarp;
  double x = 0;
  for (int m = lane; m < members; m += kWarp) {
    int at = slab, left = m;
    unit = 1;
    for (int d = f.dims - 1; d >= 0; --d) {
      if (!(r.kept >> d & 1)) {
        at += left % f.along[d] * unit;
        left /= f.along[d];
      }
      unit *= f.along[d];
    }
    x += partials[at * f.width + place];
  }
  x = warp_sum(x);
  if (lane != 0) return;
  if (r.is_value) x = x / (sums.divisor * value_of(sums.divisor_at));
  with_type(r.dtype, [&](auto type) {
    using S = decltype(type);
    using T = Arithmetic<S>;
    S narrowed;
    narrow(x, narrowed);
    if (!r.is_value && f.upstream.data != nullptr)
      narrow(static_cast<T>(widen(narrowed)) * static_cast<T>(value_of(f.upstream)), narrowed);
    static_cast<S*>(r.data)[f.slabs > 0 ? offset : out] = narrowed;
  });
}

// The slabs and tiles for a pass. Its folded results are numbered in the order of the inputs; the value comes last.
Folding folding_of(const PassArgs&);

// What a pass leaves to finish(): its sums, or parts of them, and its folded results.
struct Part {
  Work work;  // each item has a partial sum
  Target target;
  Folding fold;
  double* partials = nullptr;  // memory for both

  bool is_finished() const { return target.partials == nullptr && fold.count == 0; }
};

// Adds up what one or two passes have left (pass.cu).
cudaError_t finish(const Part (&)[2], const Combination&, const Launch&);

// Runs the pass of formula F and, unless `kl` is nullptr, the latents' KL in the same kernel. Defined in pass.cuh and
// compiled in a separate file for each formula.
template <class F>
cudaError_t run(const PassArgs&, const PassArgs* kl, const Combination&, Part (&)[2], const Launch&);

}  // namespace fastvae::cuda
