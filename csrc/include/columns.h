// The rows of `coef`, `levels` and what comes in pairs, as the tensors hold them. The members'
// names and order are those of tdkern/columns.py.
#pragma once

#include "device.h"

namespace tdkern {

struct Coef {  // a row of coef [B, 8]
  double skip, scale, skip_p, scale_p, A, A_p, w_td, w_base;
};
static_assert(sizeof(Coef) == 8 * sizeof(double));

struct Levels {  // a row of levels [B, 4]
  double sigma, sigma_tau, sigma_p, sigma_tau_p;
};
static_assert(sizeof(Levels) == 4 * sizeof(double));

// A row of [B, 2]: a sample's two losses, the sums that they are made of, or their gradients.
template <typename T>
struct Terms {
  T td, base;
};

}  // namespace tdkern
