// The mixture of logistics, 32 pixels at a time. A block has a row of 32 pixels for each channel, whatever the tensors'
// layout. Several short loops over the components replace a long one, so that the processor overlaps their iterations.
// Compiled once for each instruction set.
#include "logistic_mixture.h"

#include <vector>

#include "../formulas/logistic_mixture.h"
#include "blocks.h"
#include "transpose.h"

FASTVAE_NAMESPACE_BEGIN

constexpr int kPixels = 32;

template <class T>
struct Rows {
  T* data;
  T* operator[](int row) const { return data + row * kPixels; }
};

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }

// Reads all channels of the pixels [i, i + n). `first` is the view of the first channel.
template <class T>
void read_rows(const View& first, int64_t step, int channels, int64_t i, int n, Rows<T> rows) {
  with_type(first.dtype, [&](auto type) {
    using Stored = decltype(type);
    const int64_t stride = first.stride[first.dims - 1];
    for_each_run(first, i, n, [&](int done, int64_t offset, int run) {
      const Stored* from = static_cast<const Stored*>(first.data) + offset;
      int c = 0;
      if constexpr (std::is_same_v<Stored, float> && std::is_same_v<T, float>) {
        if (step == 1 && run % 4 == 0) {
          c = channels / 4 * 4;
          transpose(from, stride, rows[0] + done, kPixels, run, c);
        }
      }
      for (; c < channels; ++c) {
        const Stored* plane = from + c * step;
        T* to = rows[c] + done;
        if (stride == 1) {
          prefetch(plane + run, run * sizeof(Stored));
          if (std::is_same_v<Stored, T> && run == kPixels) {
            memcpy(to, plane, kPixels * sizeof(T));
          } else {
            widen(plane, to, run);
          }
        } else {
          for (int j = 0; j < run; ++j) to[j] = static_cast<T>(widen(plane[j * stride]));
        }
      }
    });
  });
}

// Writes all channels; if `streamed`, past the caches. Pixels with adjacent channels then go to `stage` first.
template <class T>
void write_rows(const View& first, int64_t step, int channels, int64_t i, int n, Rows<T> rows, bool streamed,
                T* stage = nullptr) {
  with_float_type(first.dtype, [&](auto type) {
    using Stored = decltype(type);
    const int64_t stride = first.stride[first.dims - 1];
    for_each_run(first, i, n, [&](int done, int64_t offset, int run) {
      Stored *const place = static_cast<Stored*>(first.data) + offset, *pixel = place;
      int c = 0;
      if constexpr (std::is_same_v<Stored, float> && std::is_same_v<T, float>) {
        if (streamed && step == 1 && stride == channels && run == kPixels && is_aligned(place)) pixel = stage;
        if (step == 1 && run % 4 == 0) {
          c = channels / 4 * 4;
          transpose(rows[0] + done, kPixels, pixel, stride, c, run);
        }
      }
      for (; c < channels; ++c) {
        Stored* to = pixel + c * step;
        const T* from = rows[c] + done;
        if constexpr (std::is_same_v<Stored, float> && std::is_same_v<T, float>) {
          if (streamed && stride == 1 && run == kPixels && is_aligned(to)) {
            for (int j = 0; j < kPixels; j += Vec<float>::kLanes) stream(to + j, Vec<float>::load(from + j));
            continue;
          }
        }
        if (stride == 1) {
          narrow(from, to, run);
        } else {
          for (int j = 0; j < run; ++j) narrow(from[j], to[j * stride]);
        }
      }
      if constexpr (std::is_same_v<Stored, float> && std::is_same_v<T, float>) {
        for (int j = 0; pixel != place && j < kPixels * channels; j += Vec<float>::kLanes)
          stream(place + j, Vec<float>::load(stage + j));
      }
    });
  });
}

// The rows of a block, and the formula for a vector of its pixels.
template <class T, bool kGradient>
class Block {
 public:
  using V = Vec<T>;

  explicit Block(const Mixture& m)
      : K(m.components),
        C(m.channels),
        parameters(parameters_of(m)),
        mixture_(m),
        memory_((2 * parameters + 14 * K + 7) * kPixels + 64 / sizeof(T)) {
    T* next = memory_.data();
    while (!is_aligned(next)) ++next;
    const auto take = [&](Rows<T>& rows, int count) {
      rows.data = next;
      next += count * kPixels;
    };
    take(in, parameters);
    take(d, parameters);
    take(x, 3);
    take(d_x, 3);
    take(value, 1);
    take(tanh_, 3 * K);
    take(tanh_low_, 3 * K);
    for (Rows<T>* rows : {&exponent_, &ratio_, &slope_, &b_, &y_, &tail_b_, &tail_y_, &f_}) take(*rows, K);
  }

  const int K, C, parameters;
  Rows<T> in, d, x, d_x, value;
  // The next block's memory, if its pixels' channels are adjacent. It is requested little by little: the processor
  // cannot wait for many lines at a time.
  const char *ahead = nullptr, *ahead_end = nullptr;

  // A vector of pixels from j on. factor(derivative, i) gives the gradient of the parameters (i = 0) or of x (i = 1).
  template <class Factor>
  FASTVAE_INLINE void at(int j, Factor factor) {
    const auto load = [j](Rows<T> rows, int row) { return V::load(rows[row] + j); };
    const auto store = [j](Rows<T> rows, int row, V v) { v.store(rows[row] + j); };
    const V zero(T(0)), one(T(1)), half_width(static_cast<T>(mixture_.half_width)),
        least(static_cast<T>(mixture_.least_log_scale));
    Pair<V> at[3];
    for (int c = 0; c < C; ++c) {
      alignas(64) T high[V::kLanes], low[V::kLanes];
      for (int l = 0; l < V::kLanes; ++l) {
        const Pair<T> pair = scaled(mixture_, x[c][j + l]);
        high[l] = pair.high;
        low[l] = pair.low;
      }
      at[c] = {V::load(high), V::load(low)};
    }
    for (int i = 0; C == 3 && i < 3; ++i) {
      for (int k = 0; k < K; ++k) {
        const int row = mean_row(mixture_, i) + 2 * K + k;
        const Coefficient<V> by = coefficient(load(in, row));
        store(tanh_, i * K + k, by.tanh.high);
        store(tanh_low_, i * K + k, by.tanh.low);
        store(d, row, by.slope);
      }
    }
    const auto tanh_of = [&](int i, int k) { return Pair<V>{load(tanh_, i * K + k), load(tanh_low_, i * K + k)}; };
    for (int c = 0; c < C; ++c) {
      const V edge = edge_of(at[c].high, V(static_cast<T>(mixture_.low)), V(static_cast<T>(mixture_.high)));
      for (int k = 0; k < K; ++k) {
        const int row = mean_row(mixture_, c) + k;
        const V mean = load(in, row), distant = c == 0   ? distance<0>(at, mean, {}, {})
                                                : c == 1 ? distance<1>(at, mean, tanh_of(0, k), {})
                                                         : distance<2>(at, mean, tanh_of(1, k), tanh_of(2, k));
        const Edges<V> edges = edges_of(distant, load(in, row + K), edge, half_width, least);
        store(slope_, k, edges.slope);
        store(b_, k, edges.b);
        store(y_, k, edges.y);
      }
      for (int k = 0; k < K; ++k) {
        const Tails<V> tails = tails_of(Edges<V>{zero, load(b_, k), load(y_, k)});
        store(tail_b_, k, tails.b);
        store(tail_y_, k, tails.y);
        store(f_, k, tails.f);
      }
      for (int k = 0; k < K; ++k) {
        const int row = mean_row(mixture_, c) + k;
        for (int line = 0; line < 4 && ahead < ahead_end; ++line, ahead += 64) __builtin_prefetch(ahead);
        const LogisticBin<V> bin = logistic_bin(Edges<V>{load(slope_, k), load(b_, k), load(y_, k)},
                                                Tails<V>{load(tail_b_, k), load(tail_y_, k), load(f_, k)},
                                                load(in, row + K), half_width, least);
        store(exponent_, k, c == 0 ? bin.exponent : load(exponent_, k) + bin.exponent);
        store(ratio_, k, c == 0 ? bin.ratio : load(ratio_, k) * bin.ratio);
        if (kGradient) {
          store(d, row, bin.by_distance);
          store(d, row + K, bin.by_log_scale);
        }
      }
    }
    // The prior and the joint probability of each component, divided by their largest powers of e.
    V most_prior(Constants<T>::kLowest), most_joint = most_prior, prior = zero, joint = zero;
    for (int k = 0; k < K; ++k) {
      most_prior = at_least(load(in, k), most_prior);
      most_joint = at_least(load(in, k) - load(exponent_, k), most_joint);
    }
    for (int k = 0; k < K; ++k) {
      const V p = exponential_of_negative(load(in, k) - most_prior);
      const V w = exponential_of_negative((load(in, k) - load(exponent_, k)) - most_joint) * load(ratio_, k);
      prior = prior + p;
      joint = joint + w;
      store(d, k, p);
      store(ratio_, k, w);
    }
    store(value, 0, (most_prior - most_joint) + (logarithm(prior) - logarithm(joint)));
    if (!kGradient) return;
    const V by_prior = quotient(one, prior), by_joint = quotient(one, joint);
    V g_x[3] = {zero, zero, zero};
    for (int k = 0; k < K; ++k) {
      const V w = load(ratio_, k) * by_joint;
      store(d, k, factor(load(d, k) * by_prior - w, 0));
      V g[3];
      for (int c = 0; c < C; ++c) {
        const int row = mean_row(mixture_, c) + k;
        g[c] = w * load(d, row);
        store(d, row, factor(g[c], 0));
        store(d, row + K, factor(-(w * load(d, row + K)), 0));
        g_x[c] = g_x[c] - g[c];
      }
      if (C == 1) continue;
      for (int i = 0; i < 3; ++i) {  // the coefficients of x[0], x[0] and x[1] in the means 1, 2 and 2
        const int row = mean_row(mixture_, i) + 2 * K + k, to = i == 0 ? 1 : 2, of = i == 2 ? 1 : 0;
        store(d, row, factor(g[to] * at[of].high * load(d, row), 0));
        g_x[of] = multiply_add(load(tanh_, i * K + k), g[to], g_x[of]);
      }
    }
    for (int c = 0; c < C; ++c) store(d_x, c, factor(g_x[c] * V(static_cast<T>(mixture_.scale)), 1));
  }

 private:
  const Mixture& mixture_;
  std::vector<T> memory_;
  Rows<T> tanh_, tanh_low_, exponent_, ratio_, slope_, b_, y_, tail_b_, tail_y_, f_;
};

template <class T, bool kGradient>
void mixture_as(const MixtureArgs& args, int64_t begin, int64_t end, double* sum) {
  using V = Vec<T>;
  Block<T, kGradient> block(args.mixture);
  Reader<T> weight(args.weight), upstream(args.upstream);
  Writer<T> value(args.value);
  const Gradient<T> gradient[] = {{args, args.d[0]}, {args, args.d[1]}};
  const bool streamed = kGradient && 2 * sizeof(T) * args.numel * block.parameters >= kStreamedBytes;
  double total = 0;
  for (int64_t i = begin; i < end; i += kPixels) {
    const int n = end - i < kPixels ? static_cast<int>(end - i) : kPixels;
    read_rows(args.in[0], args.step[0], block.parameters, i, n, block.in);
    read_rows(args.in[1], args.step[1], block.C, i, n, block.x);
    if (const View& y = args.in[0]; y.dims == 1 && y.stride[0] == block.parameters && y.dtype == kDType<T>) {
      block.ahead = static_cast<const char*>(y.data) + (i + n) * block.parameters * sizeof(T);
      block.ahead_end = block.ahead + n * block.parameters * sizeof(T);
    }
    const T *w = weight.read(i, n), *up = upstream.read(i, n);
    for (int j = 0; j < n; j += V::kLanes) {
      const V zero(T(0)), here = w == nullptr ? V(T(1)) : V::load(w + j);
      block.at(j, [&](V derivative, int of) __attribute__((always_inline)) {
        if (w != nullptr) derivative = select(here == zero, zero, here * derivative);
        return gradient[of](derivative, up == nullptr ? nullptr : up + j);
      });
      if (w != nullptr) {
        T* values = block.value[0] + j;
        select(here == zero, zero, here * V::load(values)).store(values);
      }
    }
    for (int j = 0; j < n; ++j) total += static_cast<double>(block.value[0][j]);
    if (T* to = value.write(i, n); to != nullptr) {
      memcpy(to, block.value[0], n * sizeof(T));
      value.flush();
    }
    if (!kGradient) continue;
    if (args.d[0].data != nullptr)
      write_rows(args.d[0], args.d_step[0], block.parameters, i, n, block.d, streamed, block.in.data);
    if (args.d[1].data != nullptr) write_rows(args.d[1], args.d_step[1], block.C, i, n, block.d_x, false);
  }
  if (streamed) fence();
  if (sum != nullptr) *sum = total;
}

template <class T>
void draw_pixels(const MixtureArgs& args, int64_t begin, int64_t end) {
  const Mixture& m = args.mixture;
  const int parameters = parameters_of(m);
  const uint64_t seed = seed_of(args.noise), offset = offset_of(args.noise);
  std::vector<T> memory((parameters + 3) * kPixels);
  const Rows<T> in{memory.data()}, out{in[parameters]};
  for (int64_t i = begin; i < end; i += kPixels) {
    const int n = end - i < kPixels ? static_cast<int>(end - i) : kPixels;
    read_rows(args.in[0], args.step[0], parameters, i, n, in);
    for (int j = 0; j < n; ++j) {
      draw_pixel<T>(
          m, [&](int row) { return in[row][j]; },
          RandomWords<T>(seed, offset, static_cast<uint64_t>(i + j) * (m.components + m.channels)),
          [&](int c, T x) { out[c][j] = x; });
    }
    write_rows(args.z, args.z_step, m.channels, i, n, out, false);
  }
}

template <class T>
void mixture_of(const MixtureArgs& args, int64_t begin, int64_t end, double* sum) {
  if (args.z.data != nullptr) return draw_pixels<T>(args, begin, end);
  return args.d[0].data != nullptr || args.d[1].data != nullptr ? mixture_as<T, true>(args, begin, end, sum)
                                                                : mixture_as<T, false>(args, begin, end, sum);
}

void logistic_mixture(const MixtureArgs& args, int64_t begin, int64_t end, double* sum) {
  return args.float64 ? mixture_of<double>(args, begin, end, sum) : mixture_of<float>(args, begin, end, sum);
}

FASTVAE_NAMESPACE_END
