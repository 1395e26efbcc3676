// Adam and AdamW for one element, without torch; CPU and CUDA both call it. Every operation rounds
// where torch.optim.Adam's does.
#pragma once

#include "ema_update_math.h"

namespace tdkern {

struct AdamOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;
};

// What is the same for all elements of a parameter in one step.
template <typename T>
struct AdamStep {
  T grad_factor, shrink, weight_decay, weight1, beta2, weight2, correction2, eps, minus_step_size;
};

// step: the count of steps with this one.
TDKERN_HD AdamStep<double> make_adam_step(const AdamOptions& o,
                                          double lr,
                                          double grad_factor,
                                          double step) {
  return {.grad_factor = grad_factor,
          .shrink = o.decoupled ? 1.0 - lr * o.weight_decay : 1.0,
          .weight_decay = o.decoupled ? 0.0 : o.weight_decay,
          .weight1 = 1.0 - o.beta1,
          .beta2 = o.beta2,
          .weight2 = 1.0 - o.beta2,
          .correction2 = pow(1.0 - pow(o.beta2, step), 0.5),
          .eps = o.eps,
          .minus_step_size = -(lr / (1.0 - pow(o.beta1, step)))};
}

template <typename T>
TDKERN_HD AdamStep<T> narrow_step(const AdamStep<double>& s) {
  return {.grad_factor = static_cast<T>(s.grad_factor),
          .shrink = static_cast<T>(s.shrink),
          .weight_decay = static_cast<T>(s.weight_decay),
          .weight1 = static_cast<T>(s.weight1),
          .beta2 = static_cast<T>(s.beta2),
          .weight2 = static_cast<T>(s.weight2),
          .correction2 = static_cast<T>(s.correction2),
          .eps = static_cast<T>(s.eps),
          .minus_step_size = static_cast<T>(s.minus_step_size)};
}

// What found_inf looks at: the square that adam_element puts into the second moment, which once it
// is infinite holds the parameter where it is for good.
template <typename T, typename V>
TDKERN_HD V grad_square(V grad, T grad_factor) {
  grad = grad * grad_factor;
  return grad * grad;
}

template <typename T, typename V>
TDKERN_HD void adam_element(const AdamStep<T>& s, V grad, V& param, V& exp_avg, V& exp_avg_sq) {
  grad = grad * s.grad_factor;
  if (s.weight_decay != T(0)) grad = fused(param, V() + s.weight_decay, grad);
  param = param * s.shrink;
  exp_avg = lerp_element(exp_avg, grad, s.weight1);
  exp_avg_sq = fused(s.weight2 * grad, grad, exp_avg_sq * s.beta2);
  const V denominator = square_root(exp_avg_sq) / s.correction2 + s.eps;
  param = param + s.minus_step_size * exp_avg / denominator;
}

}  // namespace tdkern
