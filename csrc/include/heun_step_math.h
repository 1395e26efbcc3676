// The mathematics of heun_step for one element, without torch. Every step is linear in the state, F
// and the noise.
#pragma once

#include "device.h"

namespace tdkern {

// `coef` as the tensor holds it: of the state's level and, c_in, of the level after the step.
struct StepCoef {
  double sigma, skip, scale, h, churn, c_in;
};
static_assert(sizeof(StepCoef) == 6 * sizeof(double));

// The weights of x_next at the precision of the state.
template <typename T>
struct Step {
  T x, F, x_hat, noise, c_in;
};

// An Euler step is x + h (x - skip x - scale F) / sigma; the correction its mean with x_hat.
template <typename T>
TDKERN_HD Step<T> make_step(const StepCoef& coef, bool correct) {
  const double ratio = coef.h / coef.sigma, share = correct ? 0.5 : 1.0;
  return {.x = static_cast<T>(share * (1.0 + ratio * (1.0 - coef.skip))),
          .F = static_cast<T>(-share * ratio * coef.scale),
          .x_hat = static_cast<T>(0.5),
          .noise = static_cast<T>(coef.churn),
          .c_in = static_cast<T>(coef.c_in)};
}

// V is T or a vector of T; x_hat and noise are 0 where they are not given.
template <typename T, typename V>
TDKERN_HD V step_element(const Step<T>& s, V F, V x, V x_hat, V noise) {
  const V from_state = multiply_add(s.F, F, s.x * x);
  return multiply_add(s.noise, noise, multiply_add(s.x_hat, x_hat, from_state));
}

}  // namespace tdkern
