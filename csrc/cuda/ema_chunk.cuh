// The averages of a chunk of one parameter: of ema_update_, and of adam_ema_ behind its step. Two
// at a time, so that their loads are in flight together.
#pragma once

#include "ema_update_math.h"
#include "tensor_table.cuh"

namespace tdkern {

constexpr int kAverages = 16;  // in one launch

// Read on the device, at each replay of a graph, or else from the arguments.
struct Decays {
  const double* device;
  double host[kAverages];
};

// decays [K], contiguous float64 on the CPU or on the device: those from `begin` to `end`.
inline Decays make_decays(const Tensor& decays, int64_t begin, int64_t end) {
  const auto* values = static_cast<const double*>(decays.data_ptr());
  Decays part = {};
  if (!decays.is_cpu()) {
    part.device = values + begin;
  } else {
    std::copy(values + begin, values + end, part.host);
  }
  return part;
}

template <int K, int vec, typename N, typename D, typename T>
__device__ __forceinline__ void elements(const N* param,
                                         D* const (&avg)[K],
                                         const T (&weight)[K],
                                         int i) {
  const Pack<N, vec> p = load_pack<vec>(param + i);
  Pack<D, vec> a[K];
#pragma unroll
  for (int k = 0; k < K; ++k) a[k] = load_pack<vec>(avg[k] + i);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int lane = 0; lane < vec; ++lane)
      a[k].lane[lane] =
          narrow<D, T>(ema_element<T, T>(widen(a[k].lane[lane]), widen(p.lane[lane]), weight[k]));
    store_pack<vec>(avg[k] + i, a[k]);
  }
}

template <int K, typename N, typename D>
__device__ __forceinline__ void averages(void* const* row,
                                         const TableChunk& c,
                                         const Decays& decays,
                                         int first) {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  constexpr int vec = 16 / sizeof(N);
  const N* param = static_cast<const N*>(row[0]) + c.begin;
  bool aligned = packs_start(param);
  D* avg[K];
  T weight[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    avg[k] = static_cast<D*>(row[1 + first + k]) + c.begin;
    aligned = aligned && packs_start(avg[k]);
    weight[k] =
        static_cast<T>(1 - (decays.device ? decays.device[first + k] : decays.host[first + k]));
  }
  const int packed = aligned ? c.count / vec * vec : 0;
#pragma unroll 2
  for (int i = threadIdx.x * vec; i < packed; i += kThreads * vec)
    elements<K, vec>(param, avg, weight, i);
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < c.count; i += kThreads)
    elements<K, 1>(param, avg, weight, i);
}

// row[0]: the parameter; row[1 + k]: its average k.
template <typename N, typename D>
__device__ __forceinline__ void ema_chunk(void* const* row,
                                          const TableChunk& chunk,
                                          const Decays& decays,
                                          int K) {
  int k = 0;
#pragma unroll 1
  for (; k + 2 <= K; k += 2) averages<2, N, D>(row, chunk, decays, k);
  if (k < K) averages<1, N, D>(row, chunk, decays, k);
}

}  // namespace tdkern
