// The eight numbers of one sample and its noise levels, without torch; CPU and CUDA both call it.
// The names are those of docs/mathematics.md.
#pragma once

#include <cmath>

#include "columns.h"

namespace tdkern {

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
  // The same for all samples: 1/rho, root_max = sigma_max^(1/rho), root_min = sigma_min^(1/rho),
  // and these to the power of rho, which rounding keeps from being sigma_max and sigma_min.
  double inverse_rho, root_max, root_min, end_max, end_min;
};

// EDM's schedule: sigma(i) = (a + i/(steps-1) (b - a))^rho with a = sigma_max^(1/rho), b =
// sigma_min^(1/rho).
TDKERN_HD double sigma_of_index(const CoefOptions& o, double index) {
  const double root = o.root_max + index / (o.steps - 1.0) * (o.root_min - o.root_max);
  if (root >= o.root_max) return o.end_max;
  if (root <= o.root_min) return o.end_min;
  return pow(root, o.rho);
}

// The real index of a sample on the schedule: its own or, from 0 to steps - 1, its noise level's.
TDKERN_HD double index_of(const CoefOptions& o, double noise) {
  if (o.from_index) return noise;
  const double place = (pow(noise, o.inverse_rho) - o.root_max) / (o.root_min - o.root_max);
  return fmin(fmax(place, 0.0), 1.0) * (o.steps - 1.0);
}

// The noise level `distance` steps behind a sample's index: its own at 0.
TDKERN_HD double level_behind(const CoefOptions& o, double noise, double index, double distance) {
  return distance == 0.0 && !o.from_index ? noise : sigma_of_index(o, index + distance);
}

// What the levels at t and tau, or those at t' and tau', give by themselves.
struct End {
  double skip, scale, A;
};

TDKERN_HD End end_at(const CoefOptions& o, double sigma, double sigma_tau) {
  End end;
  double kappa;
  two_moment(1.0, sigma, 1.0, sigma_tau, o.eta, &end.A, &kappa);
  preconditioning(o.precond, sigma, o.sigma_data, o.sigma_min, &end.skip, &end.scale);
  return end;
}

TDKERN_HD Coef
coef_of(const CoefOptions& o, double index, double sigma, const End& end, const End& end_p) {
  const bool in_range = o.from_index ? index >= 0.0 : sigma >= o.sigma_min && sigma <= o.sigma_max;
  const bool valid = in_range && index <= o.steps - 1.0 - (o.k_idx + o.one_idx) &&
                     sigma >= o.td_lo && sigma <= o.td_hi;
  const double w_td = valid ? td_weighting(o.weight, end.A, end_p.A, end.scale, end_p.scale) : 0.0;
  const double w_base = base_weighting(o.base_weight, sigma, o.sigma_data) *
                        (valid ? o.lambda_base : 1.0 + o.lambda_base);
  return {.skip = end.skip,
          .scale = end.scale,
          .skip_p = end_p.skip,
          .scale_p = end_p.scale,
          .A = end.A,
          .A_p = end_p.A,
          .w_td = w_td,
          .w_base = w_base};
}

}  // namespace tdkern
