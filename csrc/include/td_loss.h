// td_loss's arguments, checked and seen as rows: what the CPU's and CUDA's launchers share.
#pragma once

#include <type_traits>

#include "overlap.h"
#include "td_loss_math.h"

namespace tdkern {

struct TdLossInputs {
  // x_t and x_tp are x0 where they are not given: their skip is then 0
  Tensor F, F_p, x0, x_t, x_tp, coef;
  int64_t batch, n;  // samples, elements of each
  bool has_x_t, has_x_tp, consistency;
  Norm norm;  // of the base loss
};

inline TdLossInputs td_loss_inputs(const Tensor& out,
                                   const Tensor& out_target,
                                   const Tensor& x0,
                                   const Tensor& coef,
                                   const std::optional<Tensor>& x_t,
                                   const std::optional<Tensor>& x_tp,
                                   bool consistency,
                                   bool l1,
                                   const Tensor& layout) {
  const ScalarType net = out.scalar_type(), data = x0.scalar_type();
  check_like("td_loss", "out_target", out_target, out, net);
  check_like("td_loss", "x0", x0, out, data);
  if (x_t) check_like("td_loss", "x_t", *x_t, out, data);
  if (x_tp) check_like("td_loss", "x_tp", *x_tp, out, data);
  STD_TORCH_CHECK(coef.dim() == 2 && coef.size(0) == out.size(0) && coef.size(1) == 8 &&
                      coef.device() == out.device(),
                  "td_loss: coef must have shape [B, 8] on out's device");
  STD_TORCH_CHECK(
      coef.scalar_type() == ScalarType::Double || coef.scalar_type() == ScalarType::Float,
      "td_loss: coef must be float32 or float64");
  const Tensor coef_wide =
      coef.scalar_type() == ScalarType::Double ? coef : torch::stable::to(coef, ScalarType::Double);
  const Tensor x0_rows = as_rows(x0, layout);
  return {.F = as_rows(out, layout),
          .F_p = as_rows(out_target, layout),
          .x0 = x0_rows,
          .x_t = x_t ? as_rows(*x_t, layout) : x0_rows,
          .x_tp = x_tp ? as_rows(*x_tp, layout) : x0_rows,
          .coef = coef_wide.is_contiguous() ? coef_wide : torch::stable::contiguous(coef_wide),
          .batch = out.size(0),
          .n = elements_per_sample(out),
          .has_x_t = x_t.has_value(),
          .has_x_tp = x_tp.has_value(),
          .consistency = consistency,
          .norm = l1 ? Norm::l1 : Norm::l2};
}

// The same as plain pointers, for the kernels. N: storage of the network's outputs and of dF, D: of
// the data.
template <typename N, typename D>
struct TdLossRows {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;  // arithmetic and losses
  Rows<const N> F, F_p;
  Rows<const D> x0, x_t, x_tp;
  Rows<N> dF;                // data is null where no gradient is wanted
  const Coef* coef;          // [batch]
  const Terms<T>* upstream;  // [batch], or null for an upstream gradient of 1
  int64_t batch, n;
  bool has_x_t, has_x_tp, consistency;

  TDKERN_HD Terms<double> gradient(int64_t b) const {
    return {upstream ? upstream[b].td : 1.0, upstream ? upstream[b].base : 1.0};
  }
};

template <typename N, typename D>
TdLossRows<N, D> td_loss_rows(const TdLossInputs& in, const Tensor* grad, const Tensor* upstream) {
  using T = typename TdLossRows<N, D>::T;
  return {.F = rows<const N>(in.F),
          .F_p = rows<const N>(in.F_p),
          .x0 = rows<const D>(in.x0),
          .x_t = rows<const D>(in.x_t),
          .x_tp = rows<const D>(in.x_tp),
          .dF = grad ? rows<N>(*grad) : Rows<N>{nullptr, 0},
          .coef = static_cast<const Coef*>(in.coef.data_ptr()),
          .upstream = upstream ? static_cast<const Terms<T>*>(upstream->data_ptr()) : nullptr,
          .batch = in.batch,
          .n = in.n,
          .has_x_t = in.has_x_t,
          .has_x_tp = in.has_x_tp,
          .consistency = in.consistency};
}

inline void check_backward(const Tensor& grad, const Tensor& upstream, const TdLossInputs& in) {
  const ScalarType wide =
      in.x0.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(same_sizes(grad, in.F) && grad.scalar_type() == in.F.scalar_type() &&
                      grad.device() == in.F.device(),
                  "td_loss_backward_: grad must be as out");
  STD_TORCH_CHECK(upstream.dim() == 2 && upstream.size(0) == in.batch && upstream.size(1) == 2 &&
                      upstream.is_contiguous() && upstream.scalar_type() == wide &&
                      upstream.device() == in.F.device(),
                  "td_loss_backward_: upstream must be contiguous, of shape [B, 2] and of the "
                  "loss's dtype and device");
  std::vector<Span> spans = {span_of(grad, 0, true, is_dense(grad))};
  for (const Tensor* tensor : {&upstream, &in.F, &in.F_p, &in.x0, &in.x_t, &in.x_tp, &in.coef})
    spans.push_back(span_of(*tensor, 0, false, is_dense(*tensor)));
  refuse_overlap("td_loss_backward_", spans);
}

}  // namespace tdkern
