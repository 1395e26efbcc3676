// ema_update_'s arguments, checked: what the CPU's and CUDA's launchers share.
#pragma once

#include "ema_math.h"
#include "tensor_lists.h"

namespace tdkern {

// Rows of a parameter and its averages `begin` to `end` of the K. averages: [K, P] flat.
inline TensorLists ema_lists(const std::vector<Tensor>& averages, const std::vector<Tensor>& params, int64_t begin, int64_t end) {
  TensorLists lists(1 + end - begin, params.size());
  std::vector<const Tensor*> row(lists.columns);
  for (size_t i = 0; i < params.size(); ++i) {
    row[0] = &params[i];
    for (int64_t k = begin; k < end; ++k) {
      row[1 + k - begin] = &averages[k * params.size() + i];
      STD_TORCH_CHECK(averages[k * params.size() + i].scalar_type() == averages[i].scalar_type(), "ema_update_: the averages of one parameter must have one dtype");
    }
    STD_TORCH_CHECK(params[i].device() == params[0].device(), "ema_update_: params must be on one device");
    lists.add("ema_update_", row.data(), [](int64_t c) { return c == 0 ? "parameter" : "average"; });
  }
  return lists;
}

// decays as contiguous float64, where it is.
inline Tensor ema_decays(const Tensor& decays, const std::vector<Tensor>& averages, const std::vector<Tensor>& params) {
  STD_TORCH_CHECK(decays.dim() == 1 && (decays.scalar_type() == ScalarType::Double || decays.scalar_type() == ScalarType::Float),
                  "ema_update_: decays must be float32 or float64 of shape [K]");
  STD_TORCH_CHECK(averages.size() == decays.size(0) * params.size(), "ema_update_: averages must hold K lists of as many tensors as params");
  return torch::stable::contiguous(decays.scalar_type() == ScalarType::Double ? decays : torch::stable::to(decays, ScalarType::Double));
}

}  // namespace tdkern
