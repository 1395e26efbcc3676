// a b + c rounded once where the processor does that, and the square root, for one number or a vector of them: for formulas that
// must round where PyTorch's own do. A file of the CPU that uses them is compiled with -ffp-contract=off -fno-math-errno.
#pragma once

#include <type_traits>

#include "td_math.h"

namespace tdkern {

#if defined(__CUDACC__)
template <typename T>
TDKERN_HD T fused(T a, T b, T c) { return fma(a, b, c); }
template <typename T>
TDKERN_HD T square_root(T x) { return sqrt(x); }
#else
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
TDKERN_HD float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TDKERN_HD double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
TDKERN_HD float fused(float a, float b, float c) { return a * b + c; }
TDKERN_HD double fused(double a, double b, double c) { return a * b + c; }
#endif
TDKERN_HD float square_root(float x) { return __builtin_sqrtf(x); }
TDKERN_HD double square_root(double x) { return __builtin_sqrt(x); }

// Vectors, lane by lane: the compiler makes one instruction of it.
template <typename V, typename = std::enable_if_t<!std::is_arithmetic_v<V>>>
TDKERN_HD V fused(V a, V b, V c) {
  V result;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) result[lane] = fused(a[lane], b[lane], c[lane]);
  return result;
}
template <typename V, typename = std::enable_if_t<!std::is_arithmetic_v<V>>>
TDKERN_HD V square_root(V x) {
  V result;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) result[lane] = square_root(x[lane]);
  return result;
}
#endif

}  // namespace tdkern
