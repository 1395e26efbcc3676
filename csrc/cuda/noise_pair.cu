// noise_pair on CUDA: a thread a Philox block of four elements, a block a chunk of a sample.
#include "launch.cuh"
#include "noise_pair.h"
#include "vec.cuh"

namespace tdkern {
namespace {

constexpr int kChunk = 4 * kThreads;  // elements

// Four normals of one stream.
__device__ __forceinline__ void draw(uint32_t block, uint32_t sample, uint64_t offset, uint32_t stream, uint64_t key, float (&n)[4]) {
  uint64_t c[1][4] = {{block, sample, offset & 0xffffffff, offset >> 32 << 1 | stream}};
  philox<Lane>(c, key);
  box_muller<Lane>(static_cast<uint32_t>(c[0][0]), static_cast<uint32_t>(c[0][1]), n[0], n[1]);
  box_muller<Lane>(static_cast<uint32_t>(c[0][2]), static_cast<uint32_t>(c[0][3]), n[2], n[3]);
}
__device__ __forceinline__ void draw(uint32_t block, uint32_t sample, uint64_t offset, uint32_t stream, uint64_t key, double (&n)[4]) {
  uint64_t c[1][4] = {{block, sample, offset & 0xffffffff, offset >> 32 << 1 | stream}};
  philox<Lane>(c, key);
  box_muller(static_cast<uint32_t>(c[0][0]), static_cast<uint32_t>(c[0][1]), n[0], n[1]);
  box_muller(static_cast<uint32_t>(c[0][2]), static_cast<uint32_t>(c[0][3]), n[2], n[3]);
}

template <typename N, typename D>
struct Elements {  // the lanes of one thread
  Pack<D, 4> x0, x_t, x_tp;
  Pack<N, 4> in_t, in_tp;
};

template <typename N, typename D, typename T>
__device__ __forceinline__ void compute(Elements<N, D>& e, const PairSample<T>& s, bool shared, const T (&n1)[4], const T (&n2)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    T t, t_p;
    pair_element(s, shared, static_cast<T>(widen(e.x0.lane[w])), n1[w], n2[w], t, t_p);
    e.x_t.lane[w] = narrow<D, T>(t);
    e.x_tp.lane[w] = narrow<D, T>(t_p);
    e.in_t.lane[w] = narrow<N, T>(s.c_in * t);
    e.in_tp.lane[w] = narrow<N, T>(s.c_in_p * t_p);
  }
}

// Indexed by packs: by elements, with an index of 64 bits, nvcc takes the store apart into four.
template <typename S>
__device__ __forceinline__ void store_block(S* row, int64_t block, const Pack<S, 4>& pack) {
  reinterpret_cast<Pack<S, 4>*>(row)[block] = pack;
}

// packed: a thread's four elements lie behind one another and at a multiple of their size, in every tensor.
template <bool packed, typename N, typename D>
__global__ void __launch_bounds__(kThreads, std::is_same_v<D, double> ? 2 : kBlocks) pair_kernel(PairRows<N, D> in, int64_t chunks) {
  using T = typename PairRows<N, D>::T;
  __shared__ PairSample<T> s;
  const uint64_t key = in.key(), offset = in.counter();
#pragma unroll 1
  for (int64_t task = blockIdx.x; task < in.batch * chunks; task += gridDim.x) {
    const int64_t b = task / chunks, block = task % chunks * kThreads + threadIdx.x, k = 4 * block;
    const D* x0 = in.x0.data + b * in.x0.stride;
    D *x_t = in.x_t.data + b * in.x_t.stride, *x_tp = in.x_tp.data + b * in.x_tp.stride;
    N *in_t = in.in_t.data + b * in.in_t.stride, *in_tp = in.in_tp.data + b * in.in_tp.stride;  // not read where they are not wanted
    const bool whole = packed && k + 4 <= in.n;
    Elements<N, D> e{};
    int64_t at[4] = {};
    if (whole) {
      e.x0 = load_pack<4>(x0 + k);
    } else {
      int64_t inner = k % in.plane, outer = k / in.plane;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        at[w] = inner * in.step + outer;
        if (k + w < in.n) e.x0.lane[w] = x0[at[w]];
        if (++inner == in.plane) inner = 0, ++outer;
      }
    }

    __syncthreads();  // the last task's sample has been read
    if (threadIdx.x == 0) s = in.sample(b);
    T n1[4], n2[4] = {};
    draw(static_cast<uint32_t>(block), static_cast<uint32_t>(b), offset, 0, key, n1);
    if (!in.shared) draw(static_cast<uint32_t>(block), static_cast<uint32_t>(b), offset, 1, key, n2);
    __syncthreads();
    compute(e, s, in.shared, n1, n2);

    if (whole) {
      store_block(x_t, block, e.x_t);
      store_block(x_tp, block, e.x_tp);
      if (in.in_t.data) {
        store_block(in_t, block, e.in_t);
        store_block(in_tp, block, e.in_tp);
      }
      continue;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (k + w >= in.n) continue;
      x_t[at[w]] = e.x_t.lane[w];
      x_tp[at[w]] = e.x_tp.lane[w];
      if (in.in_t.data) {
        in_t[at[w]] = e.in_t.lane[w];
        in_tp[at[w]] = e.in_tp.lane[w];
      }
    }
  }
}

template <typename N, typename D>
void launch_pair(const Launch& launch, const PairRows<N, D>& view) {
  const auto fits = [](const auto& rows) { return packs_fit(rows.data, rows.stride, 4); };
  const bool packed = view.step == 1 && fits(view.x0) && fits(view.x_t) && fits(view.x_tp) && fits(view.in_t) && fits(view.in_tp);
  const int64_t chunks = (view.n + kChunk - 1) / kChunk;
  const auto kernel = packed ? pair_kernel<true, N, D> : pair_kernel<false, N, D>;
  launch("noise_pair", kernel, grid_of(view.batch * chunks), view, chunks);
}

PairTensors noise_pair(Tensor x0, Tensor alpha, Tensor sigma, Tensor alpha_p, Tensor sigma_p, bool shared, int64_t seed, std::optional<Tensor> seed_at,
                       int64_t offset, std::optional<Tensor> offset_at, std::optional<Tensor> c_in, std::optional<Tensor> c_in_p, ScalarType net) {
  const Launch launch(x0);
  return noise_pair_with<__nv_bfloat16, __half>(x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at, offset, offset_at, c_in, c_in_p, net,
                                                [&](const auto& view) { launch_pair(launch, view); });
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) { m.impl("noise_pair.cuda", TORCH_BOX(&tdkern::noise_pair)); }
