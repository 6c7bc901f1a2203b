// Compiled once for each instruction set; FASTVAE_ISA and FASTVAE_FUNCTIONS name this copy.
#include "functions.h"

#include "../math/gamma.h"
#include "vec.h"

FASTVAE_NAMESPACE_BEGIN

// Calls `function` for a vector at a time. The last vector is filled up with zeros.
template <class S, class F>
void for_each_vector(const void* const* x, void* out, int64_t n, F function) {
  using V = Vec<S>;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const size_t bytes = (n - i < V::kLanes ? n - i : V::kLanes) * sizeof(S);
    S in[3][V::kLanes] = {}, result[V::kLanes];
    for (int k = 0; k < 3; ++k)
      if (x[k] != nullptr) memcpy(in[k], static_cast<const S*>(x[k]) + i, bytes);
    function(V::load(in[0]), V::load(in[1]), V::load(in[2])).store(result);
    memcpy(static_cast<S*>(out) + i, result, bytes);
  }
}

template <class S>
void functions_of(cpu::Function function, const void* const* x, void* out, int64_t n) {
  using V = Vec<S>;
  const auto run = [&](auto f) { for_each_vector<S>(x, out, n, f); };
  switch (function) {
    case cpu::Function::multiply_add:
      return run([](V a, V b, V c) { return multiply_add(a, b, c); });
    case cpu::Function::exponential:
      return run([](V a, V, V) { return exponential(a); });
    case cpu::Function::exponential_of_log_weight:
      return run([](V a, V, V) { return exponential_of_log_weight(a); });
    case cpu::Function::expm1:
      return run([](V a, V, V) { return exp_parts(a).expm1; });
    case cpu::Function::expm1_minus:
      return run([](V a, V, V) { return exp_parts(a).expm1_minus; });
    case cpu::Function::expm1_of_negative:
      return run([](V a, V, V) { return exp_with_expm1(a).expm1; });
    case cpu::Function::logarithm:
      return run([](V a, V, V) { return logarithm(a); });
    case cpu::Function::log1p:
      return run([](V a, V, V) { return log1p(a); });
    case cpu::Function::delta:
      return run([](V a, V, V) { return stirling_of_any(a).delta; });
    case cpu::Function::chi:
      return run([](V a, V, V) { return stirling_of_any(a).chi; });
    case cpu::Function::sine:
    case cpu::Function::cosine:
      return run([&](V a, V, V) {
        V sine, cosine;
        sine_cosine(a, sine, cosine);
        return function == cpu::Function::sine ? sine : cosine;
      });
  }
}

void functions(cpu::Function function, bool float64, const void* const* x, void* out, int64_t n) {
  return float64 ? functions_of<double>(function, x, out, n) : functions_of<float>(function, x, out, n);
}

FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Functions FASTVAE_FUNCTIONS = FASTVAE_ISA::functions;
}
