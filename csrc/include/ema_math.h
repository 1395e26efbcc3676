// The average of one element, without torch; CPU and CUDA both call it.
#pragma once

#include "td_math.h"

namespace tdkern {

// avg + weight (param - avg), from the nearer end as torch.lerp does; a parameter that is not finite leaves avg as it is.
template <typename T, typename V>
TDKERN_HD V ema_element(V avg, V param, T weight) {
  const V change = param - avg;
  const V next = weight < T(0.5) ? avg + weight * change : param - (T(1) - weight) * change;
  return param - param == T(0) ? next : avg;
}

}  // namespace tdkern
