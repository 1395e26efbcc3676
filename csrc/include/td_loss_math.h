// The TD loss of one element, without torch. CPU and CUDA both call it: a formula stands here once.
// The names are those of docs/mathematics.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "columns.h"

namespace tdkern {

enum class Norm : int { none, l2, l1 };  // of the base loss: off, base^2 or |base|

// A sample's constants at the precision of its arithmetic. dF = grad_td delta + grad_base base, for
// l1 sign(base).
template <typename T>
struct Sample {
  T skip, scale, skip_p, scale_p, A, A_p, grad_td, grad_base;
};

// n: the sample's element count; upstream: the gradients of its two losses.
template <typename T>
TDKERN_HD Sample<T> make_sample(Norm base,
                                const Coef& coef,
                                int64_t n,
                                const Terms<double>& upstream,
                                bool has_x_t,
                                bool has_x_tp) {
  const double unit = -2.0 * coef.scale / static_cast<double>(n);
  const double unit_base = base == Norm::l1 ? unit / 2 : unit;
  return {.skip = static_cast<T>(has_x_t ? coef.skip : 0.0),
          .scale = static_cast<T>(coef.scale),
          .skip_p = static_cast<T>(has_x_tp ? coef.skip_p : 0.0),
          .scale_p = static_cast<T>(coef.scale_p),
          .A = static_cast<T>(coef.A),
          .A_p = static_cast<T>(coef.A_p),
          .grad_td = static_cast<T>(unit * coef.w_td * upstream.td * coef.A),
          .grad_base = static_cast<T>(unit_base * coef.w_base * upstream.base)};
}

// 0 at 0, and NaN at NaN, so that a step of it can be seen and skipped.
template <typename T, typename V>
TDKERN_HD V sign(V x) {
  if constexpr (std::is_same_v<T, V>) {
    if (x > 0) return 1;
    return x < 0 ? -1 : x;
  } else {
    // |x| by its bits, and a division: GCC takes a comparison of vectors that are wider than the
    // processor's apart, but not this
    using Bits = decltype(x > x);
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    return x / (reinterpret_cast<V>(reinterpret_cast<Bits>(x) &
                                    (Bits{} + std::numeric_limits<Int>::max())) +
                std::numeric_limits<T>::min());
  }
}

// Adds delta^2 and base^2, or |base|, to the sums and returns dF. V is T or a vector of T. A term
// that is off is not computed at all.
template <bool TD, Norm BASE, bool CONSISTENCY, typename T, typename V>
TDKERN_HD V
td_element(const Sample<T>& s, V F, V F_p, V x0, V x_t, V x_tp, V& sum_td, V& sum_base) {
  V dF = {};
  const V e = x0 - multiply_add(s.scale, F, s.skip * x_t);
  V e_p = {};
  if constexpr (TD || CONSISTENCY) e_p = x0 - multiply_add(s.scale_p, F_p, s.skip_p * x_tp);
  if constexpr (TD) {
    const V delta = multiply_add(s.A, e, -(s.A_p * e_p));
    sum_td = multiply_add(delta, delta, sum_td);
    dF = s.grad_td * delta;
  }
  if constexpr (BASE != Norm::none) {
    V base = e;
    if constexpr (CONSISTENCY) base = e - e_p;
    V slope = base;
    if constexpr (BASE == Norm::l1) slope = sign<T>(base);
    sum_base = multiply_add(slope, base, sum_base);
    dF = multiply_add(s.grad_base, slope, dF);
  }
  return dF;
}

// The losses of a sample of n elements from the sums over them. A term that is off is 0, whatever
// its sum is.
template <typename T>
TDKERN_HD Terms<T> weighted_mean(const Coef& coef, const Terms<double>& sum, int64_t n) {
  const double count = static_cast<double>(n);
  const double td = coef.w_td == 0 || n == 0 ? 0 : coef.w_td * sum.td / count;
  const double base = coef.w_base == 0 || n == 0 ? 0 : coef.w_base * sum.base / count;
  return {static_cast<T>(td), static_cast<T>(base)};
}

}  // namespace tdkern
