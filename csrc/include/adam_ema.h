// adam_ema_'s arguments, checked: what the CPU's and CUDA's launchers share.
#pragma once

#include <cmath>

#include "adam_ema_math.h"
#include "tensor_lists.h"

namespace tdkern {

// A number that is in memory, the host's or the device's, or that travels with the arguments.
struct Number {
  const void* data;  // null: `given`
  bool wide;         // float64, else float32
  double given;
  TDKERN_HD double value() const {
    if (data == nullptr) return given;
    return wide ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

// 1 where there is no tensor.
inline Number number(const char* op, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, false, 1};
  const ScalarType dtype = tensor->scalar_type();
  STD_TORCH_CHECK(
      tensor->numel() == 1 && (dtype == ScalarType::Double || dtype == ScalarType::Float), op, ": ",
      name, " must be one float32 or float64");
  return {tensor->data_ptr(), dtype == ScalarType::Double, 1};
}

// What every gradient is multiplied by.
struct GradFactor {
  Number grad_scale, clip;
  TDKERN_HD double value() const { return clip.value() / grad_scale.value(); }
};

inline int64_t* counter(const Tensor& skipped) {
  STD_TORCH_CHECK(skipped.numel() == 1 && skipped.scalar_type() == ScalarType::Long,
                  "adam_ema_: skipped must be one int64");
  return static_cast<int64_t*>(skipped.data_ptr());
}

constexpr int64_t kAdamColumns = 4;  // grad, exp_avg, exp_avg_sq, param; then the averages

// Rows [grad, exp_avg, exp_avg_sq, param, averages ..., step]: from the parameter on they are rows
// of ema_update_.
inline TensorLists adam_lists(const std::vector<Tensor>& params,
                              const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& exp_avgs,
                              const std::vector<Tensor>& exp_avg_sqs,
                              const std::vector<Tensor>& steps,
                              const std::vector<Tensor>& averages,
                              int64_t K) {
  const size_t P = params.size();
  STD_TORCH_CHECK(
      grads.size() == P && exp_avgs.size() == P && exp_avg_sqs.size() == P && steps.size() == P,
      "adam_ema_: grads, exp_avgs, exp_avg_sqs and steps must be as long as params");
  STD_TORCH_CHECK(averages.size() == K * P,
                  "adam_ema_: averages must hold K lists of as many tensors as params");
  TensorLists lists(kAdamColumns + K, P, 1);
  std::vector<const Tensor*> row(lists.columns);
  for (size_t i = 0; i < P; ++i) {
    row[0] = &grads[i];
    row[1] = &exp_avgs[i];
    row[2] = &exp_avg_sqs[i];
    row[3] = &params[i];
    for (int64_t k = 0; k < K; ++k) row[kAdamColumns + k] = &averages[k * P + i];
    const ScalarType dtype = params[i].scalar_type();
    STD_TORCH_CHECK(
        grads[i].scalar_type() == dtype && exp_avgs[i].scalar_type() == dtype &&
            exp_avg_sqs[i].scalar_type() == dtype,
        "adam_ema_: a gradient, exp_avg and exp_avg_sq must have their parameter's dtype");
    for (int64_t k = 1; k < K; ++k)
      STD_TORCH_CHECK(row[kAdamColumns + k]->scalar_type() == averages[i].scalar_type(),
                      "adam_ema_: the averages of one parameter must have one dtype");
    STD_TORCH_CHECK(
        params[i].device() == params[0].device() && steps[i].device() == params[0].device(),
        "adam_ema_: params and steps must be on one device");
    STD_TORCH_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Float,
                    "adam_ema_: a step must be one float32");
    lists.add("adam_ema_", row.data());
    lists.add_tail(steps[i]);
  }
  lists.refuse_overlap("adam_ema_");
  return lists;
}

}  // namespace tdkern
