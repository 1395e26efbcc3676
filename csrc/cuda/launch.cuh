// Where and how a kernel runs: torch's current stream on the tensor's device, and a check after every launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "checks.h"

// Weak: a torch without CUDA, against which this library builds and loads too, has no such symbol.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tdkern {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // an SM, at the least: 80 registers a thread

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "tdkern was built against a torch without CUDA: build it again, `pip install --no-build-isolation .`");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), reinterpret_cast<void**>(&stream)));
  }
};

// Blocks for `tasks`, which the kernel strides over where they are more than a grid holds.
inline int grid_of(int64_t tasks) { return static_cast<int>(std::min<int64_t>(tasks, 0x7fffffff)); }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace tdkern
