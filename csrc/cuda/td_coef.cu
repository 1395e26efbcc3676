// td_coef on CUDA: one thread per sample, float64.
#include <string>
#include <tuple>

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

std::tuple<Tensor, Tensor> td_coef(Tensor noise,
                                   bool from_index,
                                   int64_t steps,
                                   double sigma_min,
                                   double sigma_max,
                                   double rho,
                                   double sigma_data,
                                   double k_idx,
                                   double one_idx,
                                   double lambda_base,
                                   std::string precond,
                                   std::string base_weight,
                                   double eta,
                                   std::string weight,
                                   double td_lo,
                                   double td_hi) {
  const CoefOptions options =
      coef_options(from_index, steps, sigma_min, sigma_max, rho, sigma_data, k_idx, one_idx,
                   lambda_base, precond, base_weight, eta, weight, td_lo, td_hi);
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
  m.impl("td_coef.cuda", TORCH_BOX(&tdkern::td_coef));
}
