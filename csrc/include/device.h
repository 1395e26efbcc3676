// What the compilers of the host and of the device need to be told, for formulas that both compile.
#pragma once

#if defined(__CUDACC__)
#define TDKERN_HD __host__ __device__ __forceinline__
#else
#define TDKERN_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define TDKERN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // the host's pass, in which nothing of this runs
#define TDKERN_UNROLL
#else
#define TDKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace tdkern {

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

}  // namespace tdkern
