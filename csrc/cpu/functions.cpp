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

// False if there is no function of this name.
template <class S>
bool functions_of(const char* name, const void* const* x, void* out, int64_t n) {
  using V = Vec<S>;
  const auto is = [&](const char* known, auto function) {
    if (strcmp(name, known) != 0) return false;
    for_each_vector<S>(x, out, n, function);
    return true;
  };
  const auto circle = [](V a) {
    std::pair<V, V> both;
    sine_cosine(a, both.first, both.second);
    return both;
  };
  return is("multiply_add", [](V a, V b, V c) { return multiply_add(a, b, c); }) ||
         is("exponential", [](V a, V, V) { return exponential(a); }) ||
         is("exponential_of_log_weight", [](V a, V, V) { return exponential_of_log_weight(a); }) ||
         is("expm1", [](V a, V, V) { return exp_parts(a).expm1; }) ||
         is("expm1_minus", [](V a, V, V) { return exp_parts(a).expm1_minus; }) ||
         is("expm1_of_negative", [](V a, V, V) { return exp_with_expm1(a).expm1; }) ||
         is("logarithm", [](V a, V, V) { return logarithm(a); }) || is("log1p", [](V a, V, V) { return log1p(a); }) ||
         is("delta", [](V a, V, V) { return stirling_of_any(a).delta; }) ||
         is("chi", [](V a, V, V) { return stirling_of_any(a).chi; }) ||
         is("sine", [&](V a, V, V) { return circle(a).first; }) ||
         is("cosine", [&](V a, V, V) { return circle(a).second; });
}

bool functions(const char* name, bool float64, const void* const* x, void* out, int64_t n) {
  return float64 ? functions_of<double>(name, x, out, n) : functions_of<float>(name, x, out, n);
}

FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Functions FASTVAE_FUNCTIONS = FASTVAE_ISA::functions;
}
