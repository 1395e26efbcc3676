// td_coef on CUDA: one thread per sample, float64.
#include "launch.cuh"
#include "td_coef.h"

namespace tdkern {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocks) td_coef_kernel(
    CoefOptions options, const double* noise, Coef* coef, Levels* levels, int64_t batch) {
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < batch;
       b += static_cast<int64_t>(gridDim.x) * kThreads)
    td_coef_sample(options, noise[b], coef[b], levels[b]);
}

CoefResult td_coef(const CoefOptions& options, const Tensor& noise) {
  const Launch launch(noise);
  const auto [from, coef, levels] = td_coef_tensors(noise);
  const int64_t batch = noise.size(0);
  launch("td_coef", td_coef_kernel, grid_of((batch + kThreads - 1) / kThreads), options,
         static_cast<const double*>(from.data_ptr()), static_cast<Coef*>(coef.data_ptr()),
         static_cast<Levels*>(levels.data_ptr()), batch);
  return {coef, levels};
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("td_coef.cuda", TORCH_BOX(&tdkern::td_coef_op<tdkern::td_coef>));
}
