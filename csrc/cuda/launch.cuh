// Where and how a kernel runs: torch's current stream on the tensor's device, and a check after
// every launch. Compiled for the host (csrc/host), the same kernels run on CPU tensors.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "checks.h"

#if defined(__CUDACC__)
#define TDKERN_CUDA_KEY CUDA
#else
#define TDKERN_CUDA_KEY CPU
#endif

namespace tdkern {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // per SM, at the least: 80 registers for each thread

#if defined(__CUDACC__)
constexpr int64_t kMaxGrid = 0x7fffffff;

// Torch's aoti_torch_get_current_cuda_stream, looked up in the torch that is running: so that a
// library built where torch has no CUDA serves a torch that has it.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(current_stream() != nullptr,
                    "tdkern: this torch has no CUDA: install one that has");
    TORCH_ERROR_CODE_CHECK(
        current_stream()(tensor.get_device_index(), reinterpret_cast<void**>(&stream_)));
  }

  // Runs kernel(args...) on `blocks` blocks of kThreads. op: whom to name in an error.
  template <typename... Params, typename... Args>
  void operator()(const char* op,
                  void (*kernel)(Params...),
                  int blocks,
                  const Args&... args) const {
    if (blocks == 0) return;
    kernel<<<blocks, kThreads, 0, stream_>>>(args...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#else
constexpr int64_t kMaxGrid = 3;  // so that tests see blocks of several tasks

struct Launch {
  explicit Launch(const Tensor&) {}

  template <typename... Params, typename... Args>
  void operator()(const char*, void (*kernel)(Params...), int blocks, const Args&... args) const {
    cuda_host::run(blocks, kThreads, [&] { kernel(args...); });
  }
};
#endif

// Blocks for `tasks`, which the kernel strides over where they are more than a grid holds.
inline int grid_of(int64_t tasks) { return static_cast<int>(std::min(tasks, kMaxGrid)); }

}  // namespace tdkern
