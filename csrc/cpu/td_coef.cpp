// td_coef on the CPU. Eight numbers per sample: nothing here is worth a second instruction set.
#if defined(TDKERN_LAUNCHER)
#include "td_coef.h"

namespace tdkern {
namespace {

void td_coef_sample(const CoefOptions& o, double noise, Coef& coef, Levels& levels) {
  const double index = index_of(o, noise);
  levels.sigma = level_behind(o, noise, index, 0.0);
  levels.sigma_tau = level_behind(o, noise, index, o.one_idx);
  levels.sigma_p = level_behind(o, noise, index, o.k_idx);
  levels.sigma_tau_p = level_behind(o, noise, index, o.k_idx + o.one_idx);
  const End end = end_at(o, levels.sigma, levels.sigma_tau);
  const End end_p = end_at(o, levels.sigma_p, levels.sigma_tau_p);
  coef = coef_of(o, index, levels.sigma, end, end_p);
}

CoefResult td_coef(const CoefOptions& options, const Tensor& noise) {
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

STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("td_coef.cpp", TORCH_BOX(&tdkern::td_coef_op<tdkern::td_coef>));
}
#endif  // TDKERN_LAUNCHER
