// td_coef on the CPU. Eight numbers per sample: nothing here is worth a second instruction set.
#if defined(TDKERN_LAUNCHER)
#include <string>
#include <tuple>

#include "td_coef.h"

namespace tdkern {
namespace {

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
  const auto [from, coef, levels] = td_coef_tensors(noise);
  const auto* noises = static_cast<const double*>(from.data_ptr());
  auto* to_coef = static_cast<Coef*>(coef.data_ptr());
  auto* to_levels = static_cast<Levels*>(levels.data_ptr());
  for (int64_t b = 0; b < noise.size(0); ++b)
    td_coef_sample(options, noises[b], to_coef[b], to_levels[b]);
  return {coef, levels};
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) { m.impl("td_coef.cpp", TORCH_BOX(&tdkern::td_coef)); }
#endif  // TDKERN_LAUNCHER
