// 16-byte packs over any storage type, and the reduction of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tdkern {

template <typename T>
__device__ __forceinline__ T widen(T value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename S, typename T>
__device__ __forceinline__ S narrow(T value) {
  return static_cast<S>(value);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}

// `count` elements that move together; in pieces of 16 bytes where they are more.
template <typename S, int count>
struct alignas(sizeof(S) * count < 16 ? sizeof(S) * count : 16) Pack {
  S lane[count];
};

template <int count, typename S>
__device__ __forceinline__ Pack<S, count> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, count>*>(from);
}

template <int count, typename S>
__device__ __forceinline__ void store_pack(S* to, const Pack<S, count>& pack) {
  *reinterpret_cast<Pack<S, count>*>(to) = pack;
}

// Whether packs of `count` may start at `data` and at every row behind it.
template <typename S>
bool packs_fit(const S* data, int64_t row_stride, int count) {
  const int64_t align = std::min<int64_t>(16, sizeof(S) * count);
  return reinterpret_cast<uintptr_t>(data) % align == 0 &&
         row_stride * static_cast<int64_t>(sizeof(S)) % align == 0;
}

// Sums two values over the block, in an order that only the block's size sets. Every thread calls
// it; thread 0 has the result.
template <int threads, typename T>
__device__ __forceinline__ void block_sum(T& a, T& b) {
  __shared__ T shared[2][threads];
  shared[0][threadIdx.x] = a;
  shared[1][threadIdx.x] = b;
  __syncthreads();
  for (unsigned half = threads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[0][threadIdx.x] += shared[0][threadIdx.x + half];
      shared[1][threadIdx.x] += shared[1][threadIdx.x + half];
    }
    __syncthreads();
  }
  a = shared[0][0];
  b = shared[1][0];
  __syncthreads();  // the next call writes `shared` again
}

}  // namespace tdkern
