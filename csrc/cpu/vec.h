// 64-byte vectors over any storage type, in the compiler's own vector extension: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Functions so marked are compiled once for each instruction set; the loader picks. What they call must be inlined into them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(TDKERN_NO_CLONES)
#define TDKERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TDKERN_CLONES
#endif
#define TDKERN_INLINE inline __attribute__((always_inline))

namespace tdkern {

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

template <typename T>
constexpr int kLanes = 64 / sizeof(T);

template <typename T, int lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};
template <typename T>
using Vec = typename VecOf<T, kLanes<T>>::type;

// Reads `count` elements of storage S into a vector of T, zeros behind them. A constant full `count` compiles to plain loads.
template <typename T, typename S>
TDKERN_INLINE Vec<T> load(const S* from, int64_t count) {
  using Raw = std::conditional_t<std::is_same_v<S, BFloat16>, uint16_t, S>;
  typename VecOf<Raw, kLanes<T>>::type raw = {};
  memcpy(&raw, from, count * sizeof(S));
  if constexpr (std::is_same_v<S, BFloat16>) {
    return reinterpret_cast<Vec<T>>(__builtin_convertvector(raw, Vec<uint32_t>) << 16);
  } else {
    return __builtin_convertvector(raw, Vec<T>);
  }
}

template <typename T, typename S>
TDKERN_INLINE void store(S* to, Vec<T> value, int64_t count) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const auto bits = reinterpret_cast<Vec<uint32_t>>(value);
    const Vec<uint32_t> nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    const auto raw = __builtin_convertvector(value == value ? nearest : Vec<uint32_t>{} + 0x7fc0, typename VecOf<uint16_t, kLanes<T>>::type);
    memcpy(to, &raw, count * sizeof(S));
  } else {
    const auto raw = __builtin_convertvector(value, typename VecOf<S, kLanes<T>>::type);
    memcpy(to, &raw, count * sizeof(S));
  }
}

}  // namespace tdkern
