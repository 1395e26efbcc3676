// heun_step on CUDA: one pass over flat arrays, one pack per thread.
#include <tuple>

#include "heun_step.h"
#include "launch.cuh"
#include "vec.cuh"

namespace tdkern {
namespace {

constexpr int kVec = 4;  // elements of a pack: 16 or 32 bytes of state

// Half precision goes to and from float64 through float, as in torch.
template <typename D, typename S>
__device__ __forceinline__ D widen_to(S value) {
  return static_cast<D>(widen(value));
}
template <typename S, typename D>
__device__ __forceinline__ S narrow_from(D value) {
  if constexpr (sizeof(S) == 2)
    return narrow<S, float>(static_cast<float>(value));
  else
    return static_cast<S>(value);
}

template <int vec, typename N, typename D, typename I>
__device__ __forceinline__ void elements(const HeunArrays<N, D, I>& in,
                                         const Step<D>& step,
                                         int64_t i) {
  const auto F = load_pack<vec>(in.F + i);
  const auto x = load_pack<vec>(in.x + i);
  Pack<D, vec> x_hat{}, noise{}, x_next;
  Pack<I, vec> net_input;
  if (in.x_hat) x_hat = load_pack<vec>(in.x_hat + i);
  if (in.noise) noise = load_pack<vec>(in.noise + i);
#pragma unroll
  for (int lane = 0; lane < vec; ++lane) {
    x_next.lane[lane] = step_element<D, D>(step, widen_to<D>(F.lane[lane]), x.lane[lane],
                                           x_hat.lane[lane], noise.lane[lane]);
    net_input.lane[lane] = narrow_from<I>(step.c_in * x_next.lane[lane]);
  }
  store_pack<vec>(in.x_next + i, x_next);
  if (in.net_input) store_pack<vec>(in.net_input + i, net_input);
}

// Whole packs first, the fewer than a pack that are left by the first threads.
template <int vec, typename N, typename D, typename I>
__global__ void __launch_bounds__(kThreads, kBlocks) heun_step_kernel(HeunArrays<N, D, I> in) {
  const Step<D> step = make_step<D>(*in.coef, in.x_hat != nullptr);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                packs = in.n / vec;
#pragma unroll 1
  for (int64_t pack = thread; pack < packs; pack += static_cast<int64_t>(gridDim.x) * kThreads)
    elements<vec>(in, step, pack * vec);
  if constexpr (vec > 1) {
    if (thread < in.n - packs * vec) elements<1>(in, step, packs * vec + thread);
  }
}

std::tuple<Tensor, Tensor> heun_step(Tensor F,
                                     Tensor x,
                                     Tensor coef,
                                     std::optional<Tensor> x_hat,
                                     std::optional<Tensor> noise,
                                     std::optional<ScalarType> net_dtype) {
  const Launch launch(x);
  const HeunTensors tensors = heun_tensors(F, x, coef, x_hat, noise, net_dtype);
  by_heun_storage<__nv_bfloat16, __half>(tensors, [&](auto net, auto state, auto input) {
    using N = decltype(net);
    using D = decltype(state);
    using I = decltype(input);
    const HeunArrays<N, D, I> in = heun_arrays<N, D, I>(tensors);
    if (in.n == 0) return;
    const auto fits = [](const auto* data) { return packs_fit(data, 0, kVec); };
    const bool packed = fits(in.F) && fits(in.x) && fits(in.x_hat) && fits(in.noise) &&
                        fits(in.x_next) && fits(in.net_input);
    const auto kernel = packed ? heun_step_kernel<kVec, N, D, I> : heun_step_kernel<1, N, D, I>;
    const int64_t packs = packed ? (in.n + kVec - 1) / kVec : in.n;
    launch("heun_step", kernel, grid_of((packs + kThreads - 1) / kThreads), in);
  });
  return {tensors.x_next, tensors.net_input};
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("heun_step.cuda", TORCH_BOX(&tdkern::heun_step));
}
