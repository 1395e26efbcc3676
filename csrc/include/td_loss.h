// td_loss's arguments, checked and seen as rows: what the CPU's and CUDA's launchers share.
#pragma once

#include "checks.h"

namespace tdkern {

struct TdLossInputs {
  Tensor F, F_p, x0, x_t, x_tp, coef;  // x_t and x_tp stand for x0 where they are not given: their skip is then 0
  int64_t batch, n;                    // samples, elements a sample
  bool has_x_t, has_x_tp, consistency;
};

inline TdLossInputs td_loss_inputs(const Tensor& out, const Tensor& out_target, const Tensor& x0, const Tensor& coef, const std::optional<Tensor>& x_t,
                                   const std::optional<Tensor>& x_tp, bool consistency, const Tensor& layout) {
  const ScalarType net = out.scalar_type(), data = x0.scalar_type();
  check_like("td_loss", "out_target", out_target, out, net);
  check_like("td_loss", "x0", x0, out, data);
  if (x_t) check_like("td_loss", "x_t", *x_t, out, data);
  if (x_tp) check_like("td_loss", "x_tp", *x_tp, out, data);
  STD_TORCH_CHECK(coef.dim() == 2 && coef.size(0) == out.size(0) && coef.size(1) == 8 && coef.scalar_type() == ScalarType::Double && coef.device() == out.device(),
                  "td_loss: coef must be float64 of shape [B, 8] on out's device");
  const Tensor x0_rows = as_rows(x0, layout);
  return {as_rows(out, layout), as_rows(out_target, layout), x0_rows, x_t ? as_rows(*x_t, layout) : x0_rows, x_tp ? as_rows(*x_tp, layout) : x0_rows,
          torch::stable::contiguous(coef), out.size(0), elements_per_sample(out), x_t.has_value(), x_tp.has_value(), consistency};
}

// Calls fn(N{}, D{}) with the storage types of the network's outputs and of the data.
template <typename BF16, typename F16, typename Fn>
void by_storage(ScalarType net, ScalarType data, const Fn& fn) {
  if (net == ScalarType::Float && data == net) return fn(float{}, float{});
  if (net == ScalarType::Double && data == net) return fn(double{}, double{});
  if (net == ScalarType::BFloat16 && data == net) return fn(BF16{}, BF16{});
  if (net == ScalarType::Half && data == net) return fn(F16{}, F16{});
  if (net == ScalarType::BFloat16 && data == ScalarType::Float) return fn(BF16{}, float{});
  if (net == ScalarType::Half && data == ScalarType::Float) return fn(F16{}, float{});
  STD_TORCH_CHECK(false, "td_loss: x0 must have out's dtype, or float32 beside a bfloat16 or float16 out");
}

}  // namespace tdkern
