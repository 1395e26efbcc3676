// td_coef on CUDA, float64: a thread for each of a sample's four levels. A call takes as long as
// one sample does, so what a sample's powers, roots and divisions need not wait for stands side by
// side.
#include "launch.cuh"
#include "td_coef.h"

namespace tdkern {
namespace {

constexpr int kSamples = kThreads / 4;  // of a block

__global__ void __launch_bounds__(kThreads, kBlocks)
    td_coef_kernel(CoefOptions o, const double* noise, Coef* coef, Levels* levels, int64_t batch) {
  __shared__ double sigma[4][kSamples];  // at t, tau, t', tau'
  __shared__ End ends[2][kSamples];      // at t, t'
  const int place = threadIdx.x / kSamples, s = threadIdx.x % kSamples;
  const double to_end = place / 2 * o.k_idx;
  const double distance = to_end + place % 2 * o.one_idx;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSamples;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kSamples; first < batch; first += step) {
    const int64_t b = first + s;
    const double own = b < batch ? noise[b] : 1.0;
    const double index = index_of(o, own);
    sigma[place][s] = level_behind(o, own, index, distance);
    __syncthreads();
    if (place < 2) ends[place][s] = end_at(o, sigma[2 * place][s], sigma[2 * place + 1][s]);
    if (place == 3 && b < batch) levels[b] = {sigma[0][s], sigma[1][s], sigma[2][s], sigma[3][s]};
    const double sigma_t = sigma[0][s];  // read before the next samples' is written
    __syncthreads();
    if (place == 0 && b < batch) coef[b] = coef_of(o, index, sigma_t, ends[0][s], ends[1][s]);
  }
}

CoefResult td_coef(const CoefOptions& options, const Tensor& noise) {
  const Launch launch(noise);
  const auto [from, coef, levels] = td_coef_tensors(noise);
  const int64_t batch = noise.size(0);
  launch("td_coef", td_coef_kernel, grid_of((batch + kSamples - 1) / kSamples), options,
         static_cast<const double*>(from.data_ptr()), static_cast<Coef*>(coef.data_ptr()),
         static_cast<Levels*>(levels.data_ptr()), batch);
  return {coef, levels};
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("td_coef.cuda", TORCH_BOX(&tdkern::td_coef_op<tdkern::td_coef>));
}
