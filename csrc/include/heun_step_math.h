// The mathematics of heun_step for one element, without torch. Every step is linear in the state, F
// and the noise.
#pragma once

#include "td_math.h"

namespace tdkern {

// The weights of x_next at the precision of the state.
template <typename T>
struct Step {
  T x, F, x_hat, noise, c_in;
};

// coef: sigma, skip, scale, h, churn, c_in. An Euler step is x + h (x - skip x - scale F) / sigma;
// the correction its mean with x_hat.
template <typename T>
TDKERN_HD Step<T> make_step(const double* coef, bool correct) {
  const double ratio = coef[3] / coef[0], share = correct ? 0.5 : 1.0;
  return {static_cast<T>(share * (1.0 + ratio * (1.0 - coef[1]))),
          static_cast<T>(-share * ratio * coef[2]), static_cast<T>(0.5), static_cast<T>(coef[4]),
          static_cast<T>(coef[5])};
}

// V is T or a vector of T; x_hat and noise are 0 where they are not given.
template <typename T, typename V>
TDKERN_HD V step_element(const Step<T>& s, V F, V x, V x_hat, V noise) {
  const V from_state = multiply_add(s.F, F, s.x * x);
  return multiply_add(s.noise, noise, multiply_add(s.x_hat, x_hat, from_state));
}

}  // namespace tdkern
