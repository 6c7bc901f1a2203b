// The kernels of an instruction set, and the noise. FASTVAE_ISA and FASTVAE_KERNELS name this copy.
#include "kernels.h"

#include "blocks.h"
#include "logistic_mixture.h"
#include "noise.h"

FASTVAE_NAMESPACE_BEGIN

template <class T>
void pass_in(const PassArgs&, int64_t, int64_t, int64_t, double*, double*);  // pass_float.cpp, pass_double.cpp

void pass(const PassArgs& args, int64_t event, int64_t begin, int64_t end, double* sums, double* folds) {
  return args.float64 ? pass_in<double>(args, event, begin, end, sums, folds)
                      : pass_in<float>(args, event, begin, end, sums, folds);
}

template <class T>
void normal_of(const NormalArgs& args, int64_t begin, int64_t end) {
  Writer<T> out(args.out);
  const uint64_t seed = seed_of(args.noise), offset = offset_of(args.noise);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    fill_normal(seed, offset, args.start + static_cast<uint64_t>(i), n, out.write(i, n));
    out.flush();
  }
}

void normal(const NormalArgs& args, int64_t begin, int64_t end) {
  return args.out.dtype == DType::float64 ? normal_of<double>(args, begin, end) : normal_of<float>(args, begin, end);
}

template <class T>
void scale_as(const View& tensor, T factor, int64_t begin, int64_t end) {
  Reader<T> from(tensor);
  Writer<T> to(tensor);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    const T* source = from.read(i, n);
    T* target = to.write(i, n);
    for_each_vector<T, false>(n, [&](int j) { (Vec<T>::load(source + j) * Vec<T>(factor)).store(target + j); });
    to.flush();
  }
}

void scale(const View& tensor, double factor, int64_t begin, int64_t end) {
  return tensor.dtype == DType::float64 ? scale_as<double>(tensor, factor, begin, end)
                                        : scale_as<float>(tensor, static_cast<float>(factor), begin, end);
}

FASTVAE_NAMESPACE_END

namespace fastvae::cpu {
const Kernels FASTVAE_KERNELS = {FASTVAE_ISA::pass, FASTVAE_ISA::normal, FASTVAE_ISA::scale,
                                 FASTVAE_ISA::logistic_mixture};
}
