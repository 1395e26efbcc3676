// 64-byte vectors over any storage type, in the compiler's own vector extension: one source for
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

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
  typedef T unaligned
      __attribute__((vector_size(sizeof(T) * lanes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T, kLanes<T>>::type;

// How S lies in a register before it is converted.
template <typename S>
using Raw = std::conditional_t<std::is_same_v<S, BFloat16>, uint16_t, S>;
// As many floats as T has lanes: half precision goes through them to and from float64 too, as in
// torch.
template <typename T>
using Floats = typename VecOf<float, kLanes<T>>::type;

template <typename T, typename S>
TDKERN_INLINE Vec<T> widen(typename VecOf<Raw<S>, kLanes<T>>::type raw) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const auto bits = __builtin_convertvector(raw, typename VecOf<uint32_t, kLanes<T>>::type) << 16;
    return __builtin_convertvector(reinterpret_cast<Floats<T>>(bits), Vec<T>);
  } else if constexpr (sizeof(S) < 4) {
    return __builtin_convertvector(__builtin_convertvector(raw, Floats<T>), Vec<T>);
  } else {
    return __builtin_convertvector(raw, Vec<T>);
  }
}

template <typename T, typename S>
TDKERN_INLINE typename VecOf<Raw<S>, kLanes<T>>::type narrow(Vec<T> value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    using Bits = typename VecOf<uint32_t, kLanes<T>>::type;
    const auto single = __builtin_convertvector(value, Floats<T>);
    const auto bits = reinterpret_cast<Bits>(single);
    const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    return __builtin_convertvector(single == single ? nearest : Bits{} + 0x7fc0,
                                   typename VecOf<uint16_t, kLanes<T>>::type);
  } else if constexpr (sizeof(S) < 4) {
    return __builtin_convertvector(__builtin_convertvector(value, Floats<T>),
                                   typename VecOf<S, kLanes<T>>::type);
  } else {
    return __builtin_convertvector(value, typename VecOf<S, kLanes<T>>::type);
  }
}

// A full vector of T from storage S, or its first `count` elements with zeros behind them.
template <typename T, typename S>
TDKERN_INLINE Vec<T> load(const S* from) {
  return widen<T, S>(*reinterpret_cast<const typename VecOf<Raw<S>, kLanes<T>>::unaligned*>(from));
}
template <typename T, typename S>
TDKERN_INLINE Vec<T> load(const S* from, int64_t count) {
  typename VecOf<Raw<S>, kLanes<T>>::type raw = {};
  memcpy(&raw, from, count * sizeof(S));
  return widen<T, S>(raw);
}

template <typename T, typename S>
TDKERN_INLINE void store(S* to, Vec<T> value) {
  *reinterpret_cast<typename VecOf<Raw<S>, kLanes<T>>::unaligned*>(to) = narrow<T, S>(value);
}
// Past the caches, where the set has a store for it: a line that is wholly written need not be read
// first. `to` is 64-byte aligned.
template <typename T, typename S>
TDKERN_INLINE void stream(S* to, Vec<T> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == sizeof(T))
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                               reinterpret_cast<__m512i>(narrow<T, S>(value)));
#endif
  store<T>(to, value);
}
TDKERN_INLINE void
fence() {  // after a thread's streams, before another reads: once, since it waits for all of them
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
template <typename T, typename S>
TDKERN_INLINE void store(S* to, Vec<T> value, int64_t count) {
  const auto raw = narrow<T, S>(value);
  memcpy(to, &raw, count * sizeof(S));
}

// Bytes of a result from which on it is written past the caches: no core's own would keep it.
constexpr int64_t kNonTemporalBytes = 1024 * 1024;

// step(i) for whole vectors from `begin` on, then step(i, count) for what is left before `end`:
// `step` hands `count...` on to load and store.
template <typename T, typename Step>
TDKERN_INLINE void for_each_vector(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) step(i);
  if (i < end) step(i, end - i);
}

// The sum of the lanes in float64, as a tree: a chain of scalar adds between two samples would hold
// up the loads behind it.
TDKERN_INLINE double sum(Vec<double> v) {
  using Half4 = typename VecOf<double, 4>::type;
  const Half4 four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
TDKERN_INLINE double sum(Vec<float> v) {
  return sum(
      __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), Vec<double>) +
      __builtin_convertvector(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15),
                              Vec<double>));
}

}  // namespace tdkern
