// The average of one element, without torch; CPU and CUDA both call it.
#pragma once

#include "fma.h"

namespace tdkern {

// a + weight (b - a), from the nearer end and rounded as torch.lerp does.
template <typename T, typename V>
TDKERN_HD V lerp_element(V a, V b, T weight) {
  return weight < T(0.5) ? fused(V() + weight, b - a, a) : fused(V() + (weight - T(1)), b - a, b);
}

// A parameter that is not finite leaves avg as it is. A weight of 1, which is a decay of 0, copies
// whatever avg held: NaN times 0 is NaN.
template <typename T, typename V>
TDKERN_HD V ema_element(V avg, V param, T weight) {
  const V average = weight == T(1) ? param : lerp_element(avg, param, weight);
  return param - param == T(0) ? average : avg;
}

}  // namespace tdkern
