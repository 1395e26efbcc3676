// ema_update_'s arguments, checked: what the CPU's and CUDA's launchers share.
#pragma once

#include "ema_update_math.h"
#include "tensor_lists.h"

namespace tdkern {

// Rows of a parameter and its averages `begin` to `end` of the K. averages: [K, P] flat; params: at
// least one.
inline TensorLists ema_lists(const std::vector<Tensor>& averages,
                             const std::vector<Tensor>& params,
                             int64_t begin,
                             int64_t end) {
  const int64_t K = averages.size() / params.size();
  if (begin == 0 && end < K)
    ema_lists(averages, params, 0, K);  // the checks of all, before any is written
  TensorLists lists(1 + end - begin, params.size());
  std::vector<const Tensor*> row(lists.columns);
  for (size_t i = 0; i < params.size(); ++i) {
    row[0] = &params[i];
    for (int64_t k = begin; k < end; ++k) {
      const Tensor& average = averages[k * params.size() + i];
      row[1 + k - begin] = &average;
      STD_TORCH_CHECK(average.scalar_type() == averages[i].scalar_type(),
                      "ema_update_: the averages of one parameter must have one dtype");
    }
    STD_TORCH_CHECK(params[i].device() == params[0].device(),
                    "ema_update_: params must be on one device");
    lists.add("ema_update_", row.data());
  }
  lists.refuse_overlap("ema_update_");
  return lists;
}

}  // namespace tdkern
