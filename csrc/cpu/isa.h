// Every file here is compiled once for each instruction set, its kernels in a namespace of that
// name (TDKERN_ISA), and the fastest that this processor runs is picked when the library loads.
// Only the first pass (TDKERN_LAUNCHER) has the launchers. Kernels call nothing but always-inlined
// functions, so that no code of a higher set can end up in a lower one.
#pragma once

#include <cstdlib>
#include <cstring>

#define TDKERN_INLINE inline __attribute__((always_inline))

namespace tdkern {

enum class Isa : int { base, avx2, avx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  // base, avx2 or avx512: no higher than this; for tests
  const char* most = std::getenv("TDKERN_CPU_ISA");
  if (avx512 && avx2 && (most == nullptr || std::strcmp(most, "avx512") == 0)) return Isa::avx512;
  if (avx2 && (most == nullptr || std::strcmp(most, "base") != 0)) return Isa::avx2;
#endif
  return Isa::base;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

// The kernel of the chosen set.
template <typename Kernel>
TDKERN_INLINE Kernel* pick(Kernel* avx512, Kernel* avx2, Kernel* base) {
  if (isa() == Isa::avx512) return avx512;
  return isa() == Isa::avx2 ? avx2 : base;
}

}  // namespace tdkern

// Declares kernels in the namespace of every set.
#define TDKERN_EACH_ISA(...) \
  namespace base {           \
  __VA_ARGS__                \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__                \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__                \
  }

// TDKERN_PICK(kernel<...>): the pointer to the chosen set's.
#if defined(__x86_64__)
#define TDKERN_PICK(...) tdkern::pick(&avx512::__VA_ARGS__, &avx2::__VA_ARGS__, &base::__VA_ARGS__)
#else
#define TDKERN_PICK(...) base::__VA_ARGS__
#endif
