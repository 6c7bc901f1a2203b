// ops/device.cpp, where the CPU's tensors take the CUDA kernels. All of torch's headers come first, then what replaces
// CUDA.
#include "../../csrc/ops/device.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#define FASTVAE_CUDA
#define is_cuda is_cpu
#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "emulation: a launch failed")

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/memory.cuh"

namespace c10::cuda {
// There is a current stream only while a guard has chosen the device.
struct CUDAGuard {
  explicit CUDAGuard(at::Device) { emulation::stream = &emulation::stream; }
  ~CUDAGuard() { emulation::stream = nullptr; }
  at::Device current_device() const { return {at::kCPU, 0}; }
};
inline cudaStream_t getCurrentCUDAStream() { return emulation::stream; }
}  // namespace c10::cuda

#include "../../csrc/ops/device.cpp"

namespace {

// Where a pack of four elements lies in rows of floats: the row and the column.
std::tuple<int64_t, int64_t> place(int64_t rows, int64_t columns, int64_t pack) {
  fastvae::View view;
  view.data = &view;
  view.dims = 2;
  view.size[0] = rows;
  view.stride[0] = view.size[1] = columns;
  view.stride[1] = 1;
  fastvae::cuda::RowFit fit(rows * columns, 0, fastvae::DType::float32);
  fit.add(view);
  TORCH_CHECK(fit.fits(4), "no rows of packs");
  const auto at = fastvae::cuda::Rows<float, 4, true>::place(fit.shape(), pack);
  return {at.row, at.column};
}

}  // namespace

TORCH_LIBRARY(fastvae_emulation, m) {
  // The launches since the last call: the types of the kernels' parameters, with the numbers of blocks.
  m.def("launches() -> str[]", [] { return std::exchange(emulation::launches, {}); });
  m.def("place(int rows, int columns, int pack) -> (int, int)", place);
}
