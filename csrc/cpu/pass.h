// The fused loops: one pass for every formula. blocks.h reads and writes the tensors.
#pragma once

#include <utility>

#include "../formulas/element.h"
#include "../formulas/list.h"
#include "../formulas/sample.h"
#include "blocks.h"
#include "noise.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
Vec<T> lane_numbers() {
  alignas(64) T lanes[Vec<T>::kLanes];
  for (int l = 0; l < Vec<T>::kLanes; ++l) lanes[l] = static_cast<T>(l);
  return Vec<T>::load(lanes);
}

// A sum: in T within a block, in 64 columns (32 of double) of 8 (16) elements each, and in double over the blocks.
// Element j of a block belongs to column j % 64 for every width of the vectors, so the bits do not depend on it.
template <class T>
class Sum {
 public:
  FASTVAE_INLINE void begin_block() {
    for (int c = 0; c < kColumns; c += Vec<T>::kLanes) Vec<T>(0).store(column_ + c);
  }
  FASTVAE_INLINE void add(int j, Vec<T> value) {
    T* column = column_ + j % kColumns;
    (Vec<T>::load(column) + value).store(column);
  }
  FASTVAE_INLINE void end_block() {
    constexpr int q = kColumns / 4;
    for (int l = 0; l < q; ++l)
      total_[l] += static_cast<double>((column_[l] + column_[q + l]) + (column_[2 * q + l] + column_[3 * q + l]));
  }
  double total() const {
    double sum = 0;
    for (double lane : total_) sum += lane;
    return sum;
  }

 private:
  static constexpr int kColumns = 256 / sizeof(T);
  alignas(64) T column_[kColumns];
  double total_[kColumns / 4] = {};
};

// Sums of short events, from a buffer of their elements' values.
template <class T>
void sum_events(const T* value, int n, int64_t event, double* sums) {
  for (const T* end = value + n; value < end; value += event) {
    double part[4] = {};
    int64_t j = 0;
    for (; j + 4 <= event; j += 4)
      for (int k = 0; k < 4; ++k) part[k] += static_cast<double>(value[j + k]);
    for (; j < event; ++j) part[0] += static_cast<double>(value[j]);
    *sums++ = (part[0] + part[1]) + (part[2] + part[3]);
  }
}

// Adjacent elements in memory: a whole block, or some of its elements, packed.
template <class T, int N>
struct Run {
  const T *from[N], *upstream, *weight;
  T *to[N], *value;  // where the gradients (nullptr: not wanted) and the values go
};
template <class T, class F, bool kGradient, int N>
FASTVAE_INLINE void run_formula(const Run<T, N>& run, int n, const Extras<Vec<T>>& extras,
                                const Gradient<T>* gradient) {
  using V = Vec<T>;
  const auto loop = [&](auto plain) __attribute__((always_inline)) {
    for_each_vector<T, false>(n, [&](int j) __attribute__((always_inline)) {
      V x[N], weight;
      for (int k = 0; k < N; ++k) x[k] = V::load(run.from[k] + j);
      Terms<V, N> terms;
      if constexpr (plain) {
        terms = F::at(x, extras.number);
      } else {
        if (run.weight != nullptr) weight = V::load(run.weight + j);
        terms = element<F>(x, extras, run.weight == nullptr ? nullptr : &weight, static_cast<const V*>(nullptr));
      }
      terms.value.store(run.value + j);
      for (int k = 0; kGradient && k < N; ++k) {
        const T* upstream = plain || run.upstream == nullptr ? nullptr : run.upstream + j;
        if (run.to[k] != nullptr) gradient[k](terms.d[k], upstream).store(run.to[k] + j);
      }
    });
  };
  if constexpr (F::kLight) {
    if (run.weight == nullptr && run.upstream == nullptr && !extras.has_scale && !extras.has_constant)
      return loop(std::true_type());
  }
  loop(std::false_type());
}

// For each byte: the places of its bits that are set, first to last.
struct BitPlaces {
  uint8_t count[256] = {}, place[256][8] = {};
  constexpr BitPlaces() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) place[byte][count[byte]++] = static_cast<uint8_t>(bit);
  }
};
constexpr BitPlaces kBits;

// For data that are mostly 0: computes at_zero for all elements of a block, then at_positive for the others, packed. If
// more than half are not 0, packing costs more than it saves, and both parts run in one loop. (That loop is compiled
// only for gradients in float, to save the compiler's time.)
template <class T, class F, bool kGradient, int N>
void run_sparse(const Run<T, N>& run, int n, const Extras<Vec<T>>& extras, const Gradient<T>* gradient) {
  int index[kBlock + 8], count = 0;
  constexpr int lanes = Vec<T>::kLanes;
  for (int j = 0; j < n; j += lanes) {  // from n to the last vector's end the data are 0
    uint32_t bits = bits_of(Vec<T>::load(run.from[1] + j) != Vec<T>(0));
    for (int k = 0; k < lanes; k += 8, bits >>= 8) {
      const int byte = bits & 255;
      for (int l = 0; l < 8; ++l) index[count + l] = j + k + kBits.place[byte][l];
      count += kBits.count[byte];
    }
  }
  if constexpr (kGradient && sizeof(T) == sizeof(float)) {
    if (2 * count > n) return run_formula<T, F, kGradient>(run, n, extras, gradient);
  }
  run_formula<T, Restricted<F, true>, kGradient>(run, n, extras, gradient);
  if (count == 0) return;
  alignas(64) T packed[N + 3][kBlock];
  const int whole = (count + lanes - 1) / lanes * lanes;  // filled up to whole vectors with the last element
  for (int i = count; i < whole; ++i) index[i] = index[count - 1];
  const auto pack = [&](const T* from, T* to) {
    for (int i = 0; from != nullptr && i < whole; ++i) to[i] = from[index[i]];
    return from == nullptr ? nullptr : to;
  };
  const auto scatter = [&](const T* from, T* to) {
    for (int i = 0; i < count; ++i) to[index[i]] = from[i];
  };
  Run<T, N> others;
  others.upstream = pack(run.upstream, packed[N]);
  others.weight = pack(run.weight, packed[N + 1]);
  others.value = packed[N + 2];
  for (int k = 0; k < N; ++k) {
    others.from[k] = pack(run.from[k], packed[k]);
    others.to[k] = run.to[k] == nullptr ? nullptr : packed[k];  // replaces an input that has been read
  }
  run_formula<T, Restricted<F, false>, kGradient>(others, whole, extras, gradient);
  scatter(others.value, run.value);
  for (int k = 0; kGradient && k < N; ++k)
    if (run.to[k] != nullptr) scatter(others.to[k], run.to[k]);
}

// The elements [begin, end). kExtras: the loop applies element.h's extras. A loop without them is faster.
template <class T, class F, bool kSample, bool kGradient, bool kExtras>
void pass_as(const PassArgs& args, int64_t event, int64_t begin, int64_t end, double* sums, double* folds) {
  using V = Vec<T>;
  constexpr int N = kInputsOf<F>;
  constexpr bool kLoss = !std::is_same_v<F, NoLoss>;
  Reader<T> in[N], weight(args.weight), upstream(args.upstream), given(args.eps), dz(args.dz);
  Writer<T> d[N], value(args.value, folds), z(args.z), d_eps(args.d_eps);
  Gradient<T> gradient[N];
  for (int k = 0; k < N; ++k) {
    in[k].open(args.in[k]);
    d[k].open(args.d[k], folds);
    gradient[k] = Gradient<T>(args, args.d[k]);
  }
  const Extras<V> extras(args);
  const V lanes = lane_numbers<T>();
  const uint64_t seed = seed_of(args.noise), offset = offset_of(args.noise);
  alignas(64) T noise[kBlock], values[kBlock];
  Sum<T> sum;
  const int most = event > 0 ? static_cast<int>(kBlock / event * event) : kBlock;
  for (int64_t i = begin; i < end;) {
    int n = end - i < most ? static_cast<int>(end - i) : most;
    if (event == 0 && n > kAlign) n -= n % kAlign;  // a ragged end becomes a block of its own
    const T *from[N], *up = upstream.read(i, n), *w = weight.read(i, n), *g_z = dz.read(i, n), *eps = nullptr;
    T *to[N], *to_value = event > 0 ? values : value.write(i, n), *to_z = z.write(i, n), *to_eps = d_eps.write(i, n);
    for (int k = 0; k < N; ++k) {
      from[k] = in[k].read(i, n);
      to[k] = d[k].write(i, n);
    }
    if constexpr (kSample) {
      eps = given.read(i, n);
      if (eps == nullptr) {
        fill_normal(seed, offset, static_cast<uint64_t>(i), n, noise);
        eps = noise;
      }
    }
    sum.begin_block();
    if constexpr (F::kSparse) {
      Run<T, N> run{{}, up, w, {}, to_value == nullptr ? values : to_value};
      for (int k = 0; k < N; ++k) {
        run.from[k] = from[k];
        run.to[k] = to[k];
      }
      run_sparse<T, F, kGradient>(run, n, extras, gradient);
      for_each_vector<T, false>(n, [&](int j) {
        const V terms = V::load(run.value + j);
        sum.add(j, j + V::kLanes > n ? select(lanes < V(static_cast<T>(n - j)), terms, V(0)) : terms);
      });
    } else {
      for_each_vector<T, N == 2 && !kSample && !kExtras>(n, [&](int j) __attribute__((always_inline)) {
        V x[N], g[N];
        for (int k = 0; k < N; ++k) {
          if (kLoss || k == 1 || !kGradient) x[k] = V::load(from[k] + j);
          g[k] = V(0);
        }
        V sigma(0), d_sigma(0), variance(0);
        if constexpr (kSample && kExtras) {
          const Spread<V> spread = extras.spread(x[1], true);
          sigma = spread.sigma;
          d_sigma = spread.d_sigma;
        } else if constexpr (kSample) {
          sigma = standard_deviation(x[1]);
          d_sigma = V(T(0.5)) * sigma;
        }
        if constexpr (kSample) variance = sigma * sigma;
        if constexpr (kLoss) {
          Terms<V, N> terms;
          if constexpr (kExtras) {
            V weight_here;
            if (w != nullptr) weight_here = V::load(w + j);
            terms = element<F>(x, extras, w == nullptr ? nullptr : &weight_here, kSample ? &variance : nullptr);
          } else {
            terms = at<F>(x, extras.number, kSample ? &variance : nullptr);
          }
          if (to_value != nullptr) terms.value.store(to_value + j);
          if (j + V::kLanes > n) terms.value = select(lanes < V(static_cast<T>(n - j)), terms.value, V(0));
          sum.add(j, terms.value);
          if constexpr (kGradient) {
            for (int k = 0; k < N; ++k) {
              if (to[k] == nullptr) continue;
              g[k] = gradient[k](terms.d[k], up == nullptr ? nullptr : up + j);
              if (!kSample || k > 1) g[k].store(to[k] + j);
            }
          }
        }
        if constexpr (kSample) {
          const V e = V::load(eps + j);
          if constexpr (kGradient) {
            const V g_here = V::load(g_z + j);
            if (to[0] != nullptr) (g_here + g[0]).store(to[0] + j);
            if (to[1] != nullptr) (g_here * (d_sigma * e) + g[1]).store(to[1] + j);
            if (to_eps != nullptr) (g_here * sigma).store(to_eps + j);
          } else {
            sample(x[0], sigma, e).store(to_z + j);
          }
        }
      });
    }
    sum.end_block();
    for (int k = 0; k < N; ++k) d[k].flush();
    z.flush();
    d_eps.flush();
    if (event > 0) {
      sum_events(values, n, event, sums + (i - begin) / event);
    } else {
      value.flush();
    }
    i += n;
  }
  if (event == 0 && sums != nullptr) *sums = sum.total();
}

using PassKernel = void (*)(const PassArgs&, int64_t, int64_t, int64_t, double*, double*);

// There are as few instances as speed allows, since each takes a second to compile. Heavy formulas, and all in double,
// test for extras inside the loop. In double the derivatives are always computed, even if they are not wanted.
template <class T, class F>
PassKernel pass_of(const PassArgs& args) {
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  bool gradient = args.dz.data != nullptr;
  for (const View& d : args.d) gradient |= d.data != nullptr;
  const bool extras = args.has_extras();
  if constexpr (kIsPosterior<F>) {
    if (args.z.data != nullptr || args.dz.data != nullptr) {
      if (extras) return gradient ? pass_as<T, F, true, true, true> : pass_as<T, F, true, false, true>;
      return gradient ? pass_as<T, F, true, true, false> : pass_as<T, F, true, false, false>;
    }
  }
  if constexpr (!std::is_same_v<F, NoLoss>) {
    if constexpr (F::kLight && kFloat) {
      if (!extras) return gradient ? pass_as<T, F, false, true, false> : pass_as<T, F, false, false, false>;
    }
    if constexpr (kFloat) {
      if (!gradient) return pass_as<T, F, false, false, true>;
    }
    return pass_as<T, F, false, true, true>;
  }
  return nullptr;  // no result is wanted
}

template <class T>
void pass_in(const PassArgs& args, int64_t event, int64_t begin, int64_t end, double* sums, double* folds) {
#define FASTVAE_PASS_OF(F) pass_of<T, F>,
  static constexpr PassKernel (*kByFormula[])(const PassArgs&) = {FASTVAE_FORMULAS(FASTVAE_PASS_OF)};
#undef FASTVAE_PASS_OF
  const PassKernel kernel = args.formula < 0 ? pass_of<T, NoLoss>(args) : kByFormula[args.formula](args);
  if (kernel != nullptr) kernel(args, event, begin, end, sums, folds);
}

FASTVAE_NAMESPACE_END
