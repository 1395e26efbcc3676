// Counter-based normal numbers and the coupled pair, without torch: for one lane on a GPU, for a
// vector of them on a CPU.
//
// Element k of sample b is word k % 4 of Philox4x32-10 with the seed's 64 bits as key and the
// counter
//     (k / 4, b, offset, offset >> 32 << 1 | stream),     stream 0: n1, stream 1: n2,
// whose words 0 and 1, and 2 and 3, Box-Muller turns into normals 0 and 1, and 2 and 3. float64
// takes the same words through float64 arithmetic, so both precisions draw the same numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace tdkern {

// ---- Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) --------

// A lane by itself: the types and operations that box_muller and philox are written in.
// csrc/cpu/noise_pair.cpp has a vector of them.
struct Lane {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  using W = uint32_t;  // one word; in a wider type, whatever is above its low half is ignored
  static TDKERN_HD uint64_t multiply(W word, uint32_t factor) {
    return static_cast<uint64_t>(word) * factor;
  }
  static TDKERN_HD F to_float(I value) { return static_cast<float>(value); }
  static TDKERN_HD F sqrt(F value) {  // of a normal number that is not tiny
#if defined(__CUDA_ARCH__)
    // sqrtf itself, correctly rounded, without its branch for what is left out here
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
    const float root = __fmul_rn(value, inverse);
    return ::fmaf(::fmaf(-root, root, value), __fmul_rn(0.5f, inverse), root);
#else
    return ::sqrtf(value);
#endif
  }
  static TDKERN_HD F fma(F a, F b, F c) { return ::fmaf(a, b, c); }
  static TDKERN_HD F select(I mask, F a, F b) { return mask ? a : b; }
  template <typename To, typename From>
  static TDKERN_HD To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
  }
};

struct alignas(16) PhiloxKeys {  // of each round
  uint32_t word[10][2];
};

TDKERN_HD PhiloxKeys philox_keys(uint64_t key) {
  PhiloxKeys keys;
  TDKERN_UNROLL
  for (int round = 0; round < 10; ++round) {
    keys.word[round][0] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
    keys.word[round][1] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// `chains` independent counters a lane, in step: one alone would wait for its products.
template <typename L, int chains>
TDKERN_HD void philox(typename L::W (&c)[chains][4], const PhiloxKeys& keys) {
  using W = typename L::W;
  TDKERN_UNROLL
  for (int round = 0; round < 10; ++round) {
    TDKERN_UNROLL
    for (int i = 0; i < chains; ++i) {
      const auto product_0 = L::multiply(c[i][0], 0xD2511F53u),
                 product_1 = L::multiply(c[i][2], 0xCD9E8D57u);
      c[i][0] =
          static_cast<W>(product_1 >> 32) ^ c[i][1] ^ static_cast<uint64_t>(keys.word[round][0]);
      c[i][1] = static_cast<W>(product_1);
      c[i][2] =
          static_cast<W>(product_0 >> 32) ^ c[i][3] ^ static_cast<uint64_t>(keys.word[round][1]);
      c[i][3] = static_cast<W>(product_0);
    }
  }
}

// ---- Box-Muller ---------------------------------------------------------------------------------

// Horner's scheme, the highest power's coefficient first.
template <typename L, typename... Coefficients>
TDKERN_HD typename L::F polynomial(typename L::F x, float highest, Coefficients... lower) {
  typename L::F value = typename L::F() + highest;
  ((value = L::fma(value, x, typename L::F() + lower)), ...);
  return value;
}

// Two words to two normals: n = sqrt(-2 ln u) (cos, sin)(angle), u = (a + 1/2) / 2^32. b's low 30
// bits are an angle y pi/4, -1 <= y < 1; bit 30 swaps its cosine and sine and bit 31 is the
// cosine's sign, which together cover the circle. The polynomials are minimax fits (relative error
// 2^-25.7 of -2 ln u, below 2^-27 of sine and cosine).
template <typename L>
TDKERN_HD void box_muller(typename L::U a,
                          typename L::U b,
                          typename L::F& n_0,
                          typename L::F& n_1) {
  using F = typename L::F;
  using I = typename L::I;
  using U = typename L::U;
  const I high = L::template bits<I>(a) >> 31;  // all ones where u > 1/2:
  const F x = L::fma(L::to_float(L::template bits<I>(a) ^ high), F() + 0x1p-32f,
                     F() + 0x1p-33f);  // 1 - u there, else u, since u near 1 has no digits left
  const I u = L::template bits<I>(L::select(high, 1.0f - x, x)),
          above = u - 0x3f3504f3;        // u = m 2^e, sqrt(1/2) <= m < sqrt(2)
  const I exponent = above & ~0x7fffff;  // e 2^23; e is 0 or less
  const F f = L::select(above >> 31, L::template bits<F>(u - exponent) - 1.0f, -x);  // m - 1
  const F q = polynomial<L>(f, -0.18284172f, 0.29363370f, -0.29828411f, 0.33006522f, -0.39912954f,
                            0.50011414f, -0.66668397f, 0.99999833f, -2.0f);
  const F radius = L::sqrt(L::fma(
      q, f,
      L::to_float(exponent) * (-1.38629436f * 0x1p-23f)));  // -2 ln u = -2 e ln 2 - 2 ln(1 + f)

  const F y = L::to_float(L::template bits<I>(b << 2)) * 0x1p-31f, z = y * y;
  const F sine = polynomial<L>(z, -3.5950427e-5f, 2.4900010e-3f, -8.0745429e-2f, 0.78539819f) * y;
  F cosine = polynomial<L>(z, 3.5303367e-6f, -3.2594008e-4f, 1.5854327e-2f, -0.30842513f, 1.0f);
  cosine = L::template bits<F>(L::template bits<U>(cosine) ^ (b & 0x80000000u));
  const I swap = L::template bits<I>(b << 1) >> 31;
  n_0 = radius * L::select(swap, sine, cosine);
  n_1 = radius * L::select(swap, cosine, sine);
}

// The same in float64.
TDKERN_HD void box_muller(uint32_t a, uint32_t b, double& n_0, double& n_1) {
  const double radius = sqrt(-2.0 * log((a + 0.5) * 0x1p-32)),
               y = static_cast<int32_t>(b << 2) * 0x1p-31;
#if defined(__CUDA_ARCH__)
  double sine, cosine;
  sincospi(0.25 * y, &sine, &cosine);  // sin() itself would reserve a stack for large angles
#else
  const double sine = sin(0.78539816339744831 * y);
  double cosine = cos(0.78539816339744831 * y);
#endif
  if (b >> 31) cosine = -cosine;
  n_0 = radius * (b >> 30 & 1 ? sine : cosine);
  n_1 = radius * (b >> 30 & 1 ? cosine : sine);
}

// ---- the pair -----------------------------------------------------------------------------------

// A sample's constants at the precision of its arithmetic.
template <typename T>
struct PairSample {
  T alpha_p, sigma_p, a, s;
};

// markov: the forward transition from x_t' to x_t, a = alpha / alpha', s^2 = sigma^2 - a^2
// sigma'^2. shared: a = alpha, s = sigma.
template <typename T>
TDKERN_HD PairSample<T> make_pair_sample(
    double alpha, double sigma, double alpha_p, double sigma_p, bool shared) {
  double a = alpha, s = sigma;
  if (!shared) {
    a = alpha / alpha_p;
    const double variance = sigma * sigma - (a * sigma_p) * (a * sigma_p);
    s = variance < 0 ? 0 : ::sqrt(variance);  // not fmax, which would drop a NaN
  }
  return {static_cast<T>(alpha_p), static_cast<T>(sigma_p), static_cast<T>(a), static_cast<T>(s)};
}

// V is T or a vector of T. shared: n2 is not read.
template <typename T, typename V>
TDKERN_HD void pair_element(
    const PairSample<T>& sample, bool shared, V x0, V n1, V n2, V& x_t, V& x_tp) {
  x_tp = multiply_add(sample.sigma_p, n1, sample.alpha_p * x0);
  x_t = shared ? multiply_add(sample.s, n1, sample.a * x0)
               : multiply_add(sample.s, n2, sample.a * x_tp);
}

}  // namespace tdkern
