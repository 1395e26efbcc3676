// td_coef's arguments, checked and by name: what the CPU's and CUDA's launchers share.
#pragma once

#include <initializer_list>
#include <string>
#include <tuple>

#include "checks.h"
#include "td_coef_math.h"

namespace tdkern {

template <typename Enum>
Enum named(const char* argument,
           const std::string& name,
           std::initializer_list<const char*> names) {
  int index = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(index);
    ++index;
  }
  STD_TORCH_CHECK(false, "td_coef: ", argument, " has no such value: ", name);
}

using CoefResult = std::tuple<Tensor, Tensor>;  // coef [B, 8], levels [B, 4]

// The op as torch calls it, with a backend's own part: COMPUTE(options, noise). The arguments are
// those of tdkern/ops/_schemas.py, in their order.
template <CoefResult (*COMPUTE)(const CoefOptions&, const Tensor&)>
CoefResult td_coef_op(Tensor noise,
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
  const double inverse_rho = 1.0 / rho;
  const double root_max = pow(sigma_max, inverse_rho);
  const double root_min = pow(sigma_min, inverse_rho);
  const CoefOptions options = {
      .from_index = from_index,
      .steps = static_cast<double>(steps),
      .sigma_min = sigma_min,
      .sigma_max = sigma_max,
      .rho = rho,
      .sigma_data = sigma_data,
      .k_idx = k_idx,
      .one_idx = one_idx,
      .lambda_base = lambda_base,
      .eta = eta,
      .td_lo = td_lo,
      .td_hi = td_hi,
      .precond = named<Precond>("precond", precond, {"edm", "ct"}),
      .base_weight = named<BaseWeight>("base_weight", base_weight,
                                       {"karras", "uniform", "snr", "snr+1", "truncated-snr"}),
      .weight = named<Weight>("weight", weight, {"pairwise", "pairwise_x0", "online", "none"}),
      .inverse_rho = inverse_rho,
      .root_max = root_max,
      .root_min = root_min,
      .end_max = pow(root_max, rho),
      .end_min = pow(root_min, rho)};
  return COMPUTE(options, noise);
}

struct CoefTensors {
  Tensor noise, coef, levels;
};

inline CoefTensors td_coef_tensors(const Tensor& noise) {
  STD_TORCH_CHECK(noise.dim() == 1 && noise.scalar_type() == ScalarType::Double,
                  "td_coef: noise must be float64 of shape [B]");
  return {torch::stable::contiguous(noise), torch::stable::new_empty(noise, {noise.size(0), 8}),
          torch::stable::new_empty(noise, {noise.size(0), 4})};
}

}  // namespace tdkern
