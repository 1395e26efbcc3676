// a b + c rounded once where the processor does that, and the square root, for one number or a
// 64-byte vector: for formulas that must round where PyTorch's own do. A file of the CPU that uses
// them is compiled with -ffp-contract=off -fno-math-errno.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__FMA__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "device.h"

namespace tdkern {

template <typename V>
TDKERN_HD V fused_lanes(V a, V b, V c) {
// Not lane by lane: the compiler does not always make one instruction of that.
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<std::decay_t<decltype(a[0])>, double>) {
    return reinterpret_cast<V>(_mm512_fmadd_pd(
        reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
  } else {
    return reinterpret_cast<V>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
  }
#elif defined(__FMA__)
  if constexpr (std::is_same_v<std::decay_t<decltype(a[0])>, double>) {
    struct Halves {
      __m256d low, high;
    };
    const auto x = __builtin_bit_cast(Halves, a), y = __builtin_bit_cast(Halves, b),
               z = __builtin_bit_cast(Halves, c);
    return __builtin_bit_cast(
        V, Halves{_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)});
  } else {
    struct Halves {
      __m256 low, high;
    };
    const auto x = __builtin_bit_cast(Halves, a), y = __builtin_bit_cast(Halves, b),
               z = __builtin_bit_cast(Halves, c);
    return __builtin_bit_cast(
        V, Halves{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
  }
#else
  return a * b + c;
#endif
}

template <typename V>
TDKERN_HD V fused(V a, V b, V c) {
  using std::fma;
  if constexpr (std::is_arithmetic_v<V>) {
    return fma(a, b, c);
  } else {
    return fused_lanes(a, b, c);
  }
}

template <typename V>
TDKERN_HD V square_root(V x) {
  using std::sqrt;
  if constexpr (std::is_arithmetic_v<V>) {
    return sqrt(x);
  } else {
    V root;
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) root[lane] = sqrt(x[lane]);
    return root;
  }
}

}  // namespace tdkern
