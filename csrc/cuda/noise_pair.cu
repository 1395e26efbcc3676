// noise_pair on CUDA: one block per chunk of a sample, one thread per Philox block of four elements
// at a time.
#include "launch.cuh"
#include "noise_pair.h"
#include "vec.cuh"

namespace tdkern {
namespace {

constexpr int kRound = 4 * kThreads;  // elements that a block draws at a time
// Elements of a task: so many that what a task costs once is a small part of it.
constexpr int kChunk = 4 * kRound;

// Four normals of each stream.
template <int streams, typename T>
__device__ __forceinline__ void draw(
    uint32_t block, uint32_t sample, uint64_t offset, const PhiloxKeys& keys, T (&n)[2][4]) {
  uint32_t c[streams][4];
#pragma unroll
  for (int i = 0; i < streams; ++i) {
    c[i][0] = block;
    c[i][1] = sample;
    c[i][2] = static_cast<uint32_t>(offset);
    c[i][3] = static_cast<uint32_t>(offset >> 32) << 1 | i;
  }
  philox<Lane>(c, keys);
#pragma unroll
  for (int i = 0; i < streams; ++i) {
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      if constexpr (std::is_same_v<T, double>) {
        box_muller(c[i][w], c[i][w + 1], n[i][w], n[i][w + 1]);
      } else {
        box_muller<Lane>(c[i][w], c[i][w + 1], n[i][w], n[i][w + 1]);
      }
    }
  }
}

// Where the elements of a thread lie in a sample, from element k on. Element k is at k % plane *
// step + k / plane.
struct Walk {
  int64_t plane, step, inner, outer, at;

  __device__ __forceinline__ Walk(int64_t plane, int64_t step, int64_t k)
      : plane(plane), step(step), inner(k % plane), outer(k / plane), at(inner * step + outer) {}

  // The place of this element; goes on to the next.
  __device__ __forceinline__ int64_t next() {
    const int64_t here = at;
    at += step;
    if (++inner == plane) {
      inner = 0;
      at = ++outer;
    }
    return here;
  }

  // Over the elements between two rounds.
  __device__ __forceinline__ void skip() {
    constexpr int count = kRound - 4;
    const int few = plane < count ? static_cast<int>(plane) : count + 1;
    inner += count % few;
    outer += count / few;
    if (inner >= plane) {
      inner -= plane;
      ++outer;
    }
    at = inner * step + outer;
  }
};

template <typename D>
struct Elements {  // the four of one Philox block
  Pack<D, 4> x0, x_t, x_tp;
};

template <typename D, typename T>
__device__ __forceinline__ void compute(const PairSample<T>& s,
                                        bool shared,
                                        const T (&n)[2][4],
                                        Elements<D>& e) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    T t, t_p;
    pair_element(s, shared, static_cast<T>(widen(e.x0.lane[w])), n[0][w], n[1][w], t, t_p);
    e.x_t.lane[w] = narrow<D, T>(t);
    e.x_tp.lane[w] = narrow<D, T>(t_p);
  }
}

// Blocks per SM, at the least.
template <bool packed, typename D>
constexpr int pair_blocks() {
  if (std::is_same_v<D, double>) return 2;
  return packed ? 4 : kBlocks;
}

// packed: n is a multiple of four, and four elements lie behind one another and at a multiple of
// their size, in every tensor.
template <bool packed, bool shared, typename D>
__global__ void __launch_bounds__(kThreads, (pair_blocks<packed, D>()))
    pair_kernel(PairRows<D> in, int64_t chunks) {
  using T = typename PairRows<D>::T;
  __shared__ PairSample<T> s;
  __shared__ PhiloxKeys keys;  // fewer instructions to load, four at a time, than to add up anew
  if (threadIdx.x == 0) keys = philox_keys(in.key());
  const uint64_t offset = in.counter();
#pragma unroll 1
  for (int64_t task = blockIdx.x; task < in.batch * chunks; task += gridDim.x) {
    int64_t b = task, begin = 0;
    if (chunks > 1) {
      b = task / chunks;
      begin = (task - b * chunks) * kChunk;
    }
    const int count = static_cast<int>(in.n - begin < kChunk ? in.n - begin : kChunk);
    const int64_t from = b * in.x0.stride, to = b * in.x_t.stride;  // the outputs lie alike
    const int64_t mine = begin + 4 * threadIdx.x;
    // these three, where packed, go from round to round: from an index they would be computed anew
    // in each
    const D* x0 = in.x0.data + from + mine;
    D *x_t = in.x_t.data + to + mine, *x_tp = in.x_tp.data + to + mine;
    Walk walk(packed ? in.n : in.plane, in.step, mine);

    __syncthreads();  // the keys are there, and the last task's sample has been read
    if (threadIdx.x == 0) s = in.sample(b);
#pragma unroll 1  // x_tp goes on here: all three behind the stores, and nvcc copies them first
    for (int first = 0; first < count; first += kRound, x_tp += kRound) {
      const int call = first / 4 + static_cast<int>(threadIdx.x), left = count - 4 * call;
      Elements<D> e{};
      int64_t at[4];
      T n[2][4];
      if (left > 0) {
        if constexpr (packed) {
          e.x0 = load_pack<4>(x0);
        } else {
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            at[w] = walk.next();
            if (w < left) e.x0.lane[w] = in.x0.data[from + at[w]];
          }
          walk.skip();
        }
        draw<shared ? 1 : 2>(static_cast<uint32_t>(begin / 4) + call, in.word(b), offset, keys, n);
      }
      // not before the draws, behind which thread 0's division and root hide
      if (first == 0) __syncthreads();
      if (left <= 0) continue;
      compute(s, shared, n, e);
      if constexpr (packed) {
        store_pack<4>(x_t, e.x_t);
        store_pack<4>(x_tp, e.x_tp);
        x0 += kRound, x_t += kRound;
      } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if (w >= left) continue;
          in.x_t.data[to + at[w]] = e.x_t.lane[w];
          in.x_tp.data[to + at[w]] = e.x_tp.lane[w];
        }
      }
    }
  }
}

template <bool packed, typename D>
auto kernel_of(const PairRows<D>& in) {
  return in.shared ? pair_kernel<packed, true, D> : pair_kernel<packed, false, D>;
}

template <typename D>
void launch_pair(const Launch& launch, const PairRows<D>& in) {
  const auto fits = [](const auto& rows) { return packs_fit(rows.data, rows.stride, 4); };
  const bool packed = in.step == 1 && in.n % 4 == 0 && fits(in.x0) && fits(in.x_t) && fits(in.x_tp);
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  launch("noise_pair", packed ? kernel_of<true>(in) : kernel_of<false>(in),
         grid_of(in.batch * chunks), in, chunks);
}

PairTensors noise_pair(Tensor x0,
                       Tensor alpha,
                       Tensor sigma,
                       Tensor alpha_p,
                       Tensor sigma_p,
                       bool shared,
                       int64_t seed,
                       std::optional<Tensor> seed_at,
                       int64_t offset,
                       std::optional<Tensor> offset_at,
                       int64_t first_sample) {
  const Launch launch(x0);
  return noise_pair_with<__nv_bfloat16, __half>(
      x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at, offset, offset_at, first_sample,
      [&](const auto& view) { launch_pair(launch, view); });
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("noise_pair.cuda", TORCH_BOX(&tdkern::noise_pair));
}
