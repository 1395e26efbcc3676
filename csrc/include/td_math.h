// The mathematics of the TD loss for one element and for one sample, without torch. CPU and CUDA
// both call it: a formula stands here once. Names and equations are the design's (A, kappa, skip,
// scale, delta).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define TDKERN_HD __host__ __device__ __forceinline__
#else
#define TDKERN_HD inline __attribute__((always_inline))
#endif

namespace tdkern {

// ---- one element --------------------------------------------------------------------------------

// a b + c. On the device rounded once, and by name: which products nvcc would fuse by itself
// depends on the code around them, and with that the bits would. On the CPU the compiler's flags
// decide.
template <typename A, typename V>
TDKERN_HD V multiply_add(A a, V b, V c) {
#if defined(__CUDA_ARCH__)
  return fma(static_cast<V>(a), b, c);
#else
  return a * b + c;
#endif
}

enum class Norm : int { none, l2, l1 };  // of the base loss: off, base^2 or |base|

// A sample's constants at the precision of its arithmetic. dF = grad_td delta + grad_base base, for
// l1 sign(base).
template <typename T>
struct Sample {
  T skip, scale, skip_p, scale_p, A, A_p, grad_td, grad_base;
};

// coef: the sample's eight numbers; n: its element count; g_td, g_base: the upstream gradients of
// its two losses.
template <typename T>
TDKERN_HD Sample<T> make_sample(Norm base,
                                const double* coef,
                                int64_t n,
                                double g_td,
                                double g_base,
                                bool has_x_t,
                                bool has_x_tp) {
  const double unit = -2.0 * coef[1] / static_cast<double>(n);
  return {static_cast<T>(has_x_t ? coef[0] : 0.0),
          static_cast<T>(coef[1]),
          static_cast<T>(has_x_tp ? coef[2] : 0.0),
          static_cast<T>(coef[3]),
          static_cast<T>(coef[4]),
          static_cast<T>(coef[5]),
          static_cast<T>(unit * coef[6] * g_td * coef[4]),
          static_cast<T>((base == Norm::l1 ? unit / 2 : unit) * coef[7] * g_base)};
}

// 0 at 0, and NaN at NaN, so that a step of it can be seen and skipped.
template <typename T, typename V>
TDKERN_HD V sign(V x) {
  if constexpr (std::is_same_v<T, V>) {
    return x > 0 ? 1 : x < 0 ? -1 : x;
  } else {  // GCC takes a comparison of vectors wider than the processor's apart, but not this: |x|
            // by its bits, and a division
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

// ---- one sample ---------------------------------------------------------------------------------

// kappa = r sqrt(1 - eta^2 + (eta r alpha_t / alpha_tau)^2), r = sigma_tau / sigma_t; A = alpha_tau
// - kappa alpha_t.
TDKERN_HD void two_moment(double alpha_t,
                          double sigma_t,
                          double alpha_tau,
                          double sigma_tau,
                          double eta,
                          double* A,
                          double* kappa) {
  const double r = sigma_tau / sigma_t;
  const double markov = eta * r * alpha_t / alpha_tau;
  *kappa = r * sqrt(1.0 - eta * eta + markov * markov);
  *A = alpha_tau - *kappa * alpha_t;
}

enum class Precond : int { edm, ct };
enum class BaseWeight : int { karras, uniform, snr, snr_plus_1, truncated_snr };
enum class Weight : int { pairwise, pairwise_x0, online, none };

// D = skip x + scale F.
TDKERN_HD void preconditioning(Precond precond,
                               double sigma,
                               double sigma_data,
                               double sigma_min,
                               double* skip,
                               double* scale) {
  const double shifted = precond == Precond::ct ? sigma - sigma_min : sigma;
  *skip = sigma_data * sigma_data / (shifted * shifted + sigma_data * sigma_data);
  *scale = shifted * sigma_data / sqrt(sigma * sigma + sigma_data * sigma_data);
}

TDKERN_HD double base_weighting(BaseWeight kind, double sigma, double sigma_data) {
  const double snr = 1.0 / (sigma * sigma);
  switch (kind) {
    case BaseWeight::karras:
      return snr + 1.0 / (sigma_data * sigma_data);
    case BaseWeight::uniform:
      return 1.0;
    case BaseWeight::snr:
      return snr;
    case BaseWeight::snr_plus_1:
      return snr + 1.0;
    case BaseWeight::truncated_snr:
      return fmax(snr, 1.0);
  }
  return 0.0;
}

TDKERN_HD double td_weighting(Weight kind, double A, double A_p, double scale, double scale_p) {
  const double online = A * scale * (A * scale), target = A_p * scale_p * (A_p * scale_p);
  switch (kind) {
    case Weight::pairwise:
      return 1.0 / (online + target);
    case Weight::pairwise_x0:
      return 1.0 / fmax(A * A + A_p * A_p, 0.01);
    case Weight::online:
      return 1.0 / fmax(online, 1e-8);
    case Weight::none:
      return 1.0;
  }
  return 0.0;
}

struct CoefOptions {
  bool from_index;
  double steps, sigma_min, sigma_max, rho, sigma_data, k_idx, one_idx, lambda_base, eta, td_lo,
      td_hi;
  Precond precond;
  BaseWeight base_weight;
  Weight weight;
  // The same for all samples: root_max = sigma_max^(1/rho), root_min = sigma_min^(1/rho), and these
  // to the power of rho, which rounding keeps from being sigma_max and sigma_min.
  double root_max, root_min, end_max, end_min;
};

// EDM's schedule: sigma(i) = (a + i/(steps-1) (b - a))^rho with a = sigma_max^(1/rho), b =
// sigma_min^(1/rho).
TDKERN_HD double sigma_of_index(const CoefOptions& o, double index) {
  const double root = o.root_max + index / (o.steps - 1.0) * (o.root_min - o.root_max);
  if (root >= o.root_max) return o.end_max;
  if (root <= o.root_min) return o.end_min;
  return pow(root, o.rho);
}

// The real index of sigma, from 0 to steps - 1.
TDKERN_HD double index_of_sigma(const CoefOptions& o, double sigma) {
  const double place = (pow(sigma, 1.0 / o.rho) - o.root_max) / (o.root_min - o.root_max);
  return fmin(fmax(place, 0.0), 1.0) * (o.steps - 1.0);
}

// The four levels (t, tau, t', tau') and the eight numbers of one sample from its sigma or index.
TDKERN_HD void td_coef_sample(const CoefOptions& o, double noise, double* coef, double* levels) {
  const double index = o.from_index ? noise : index_of_sigma(o, noise);
  const double sigma = o.from_index ? sigma_of_index(o, index) : noise;
  const double sigma_tau = sigma_of_index(o, index + o.one_idx);
  const double sigma_p = sigma_of_index(o, index + o.k_idx);
  const double sigma_tau_p = sigma_of_index(o, index + (o.k_idx + o.one_idx));

  double skip, scale, skip_p, scale_p, A, A_p, kappa;
  two_moment(1.0, sigma, 1.0, sigma_tau, o.eta, &A, &kappa);
  two_moment(1.0, sigma_p, 1.0, sigma_tau_p, o.eta, &A_p, &kappa);
  preconditioning(o.precond, sigma, o.sigma_data, o.sigma_min, &skip, &scale);
  preconditioning(o.precond, sigma_p, o.sigma_data, o.sigma_min, &skip_p, &scale_p);

  const bool in_range = o.from_index ? index >= 0.0 : sigma >= o.sigma_min && sigma <= o.sigma_max;
  const bool valid = in_range && index <= o.steps - 1.0 - (o.k_idx + o.one_idx) &&
                     sigma >= o.td_lo && sigma <= o.td_hi;
  coef[0] = skip;
  coef[1] = scale;
  coef[2] = skip_p;
  coef[3] = scale_p;
  coef[4] = A;
  coef[5] = A_p;
  coef[6] = valid ? td_weighting(o.weight, A, A_p, scale, scale_p) : 0.0;
  coef[7] = base_weighting(o.base_weight, sigma, o.sigma_data) *
            (valid ? o.lambda_base : 1.0 + o.lambda_base);
  levels[0] = sigma;
  levels[1] = sigma_tau;
  levels[2] = sigma_p;
  levels[3] = sigma_tau_p;
}

}  // namespace tdkern
