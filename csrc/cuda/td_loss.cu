// td_loss on CUDA: one block per chunk of a sample; where a sample is several chunks, a second
// small kernel adds their sums in order.
#include <string>
#include <tuple>

#include "launch.cuh"
#include "td_loss.h"
#include "vec.cuh"

namespace tdkern {
namespace {

constexpr int64_t kChunk = 8192;  // elements; sets the order of summation
// Of the backward pass, in which there is mostly nothing to do: to start more blocks would take
// longer than their work.
constexpr int64_t kBackwardBlocks = std::min<int64_t>(1024, kMaxGrid);

// Blocks per SM in the forward pass: four leave each thread 64 registers, but float64 needs more.
template <typename D>
constexpr int kResident = std::is_same_v<D, double> ? 3 : 4;

// `count` elements of one sample: at most kChunk, so that an int indexes them.
template <typename N, typename D>
struct Chunk {
  const N *F, *F_p;
  const D *x0, *x_t, *x_tp;
  N* dF;  // null where no gradient is wanted
  int count;
};

template <typename N, typename D>
__device__ __forceinline__ Chunk<N, D> chunk_at(const TdLossRows<N, D>& in,
                                                int64_t b,
                                                int64_t begin) {
  const auto at = [=](const auto& rows) { return rows.data + b * rows.stride + begin; };
  return {.F = at(in.F),
          .F_p = at(in.F_p),
          .x0 = at(in.x0),
          .x_t = at(in.x_t),
          .x_tp = at(in.x_tp),
          .dF = in.dF.data ? at(in.dF) : nullptr,
          .count = static_cast<int>(in.n - begin < kChunk ? in.n - begin : kChunk)};
}

template <bool TD, Norm BASE, bool CONSISTENCY, int vec, typename N, typename D, typename T>
__device__ __forceinline__ void elements(
    const Chunk<N, D>& c, const Sample<T>& sample, int i, T& td, T& base) {
  Pack<N, vec> F_p{}, dF;
  Pack<D, vec> x_tp{};
  if constexpr (TD || CONSISTENCY) {
    F_p = load_pack<vec>(c.F_p + i);
    x_tp = load_pack<vec>(c.x_tp + i);
  }
  const auto F = load_pack<vec>(c.F + i);
  const auto x0 = load_pack<vec>(c.x0 + i), x_t = load_pack<vec>(c.x_t + i);
#pragma unroll
  for (int lane = 0; lane < vec; ++lane) {
    dF.lane[lane] = narrow<N, T>(td_element<TD, BASE, CONSISTENCY, T, T>(
        sample, widen(F.lane[lane]), widen(F_p.lane[lane]), widen(x0.lane[lane]),
        widen(x_t.lane[lane]), widen(x_tp.lane[lane]), td, base));
  }
  if (c.dF) store_pack<vec>(c.dF + i, dF);
}

// Whole packs first, what is left behind them one by one.
template <bool TD, Norm BASE, bool CONSISTENCY, int vec, typename N, typename D, typename T>
__device__ __forceinline__ void loop(const Chunk<N, D>& c,
                                     const Sample<T>& sample,
                                     T& td,
                                     T& base) {
  const int packed = c.count / vec * vec;
#pragma unroll 1  // a pack of every tensor is enough in flight; more of them spill
  for (int i = threadIdx.x * vec; i < packed; i += kThreads * vec)
    elements<TD, BASE, CONSISTENCY, vec>(c, sample, i, td, base);
  if constexpr (vec > 1) {
    const int i = packed + threadIdx.x;
    if (i < c.count) elements<TD, BASE, CONSISTENCY, 1>(c, sample, i, td, base);
  }
}

template <Norm NORM, int vec, typename N, typename D, typename T>
__device__ __forceinline__ void compute(
    const TdLossRows<N, D>& in, const Chunk<N, D>& c, int64_t b, T& td, T& base) {
  const Coef& coef = in.coef[b];
  const Terms<double> upstream = in.gradient(b);
  const Sample<T> sample = make_sample<T>(NORM, coef, in.n, upstream, in.has_x_t, in.has_x_tp);
  const bool has_td = coef.w_td != 0 && upstream.td != 0;
  const bool has_base = coef.w_base != 0 && upstream.base != 0;
  if (has_td && has_base && in.consistency) return loop<true, NORM, true, vec>(c, sample, td, base);
  if (has_td && has_base) return loop<true, NORM, false, vec>(c, sample, td, base);
  if (has_td) return loop<true, Norm::none, false, vec>(c, sample, td, base);
  if (has_base && in.consistency) return loop<false, NORM, true, vec>(c, sample, td, base);
  if (has_base) return loop<false, NORM, false, vec>(c, sample, td, base);
  if (c.dF)
    for (int i = threadIdx.x; i < c.count; i += kThreads) c.dF[i] = narrow<N, T>(0);
}

// sums: [tasks], or null where a sample is one chunk and the loss can be written at once.
template <Norm NORM, int vec, typename N, typename D, typename T>
__global__ void __launch_bounds__(kThreads, kResident<D>)
    forward_kernel(TdLossRows<N, D> in, Terms<T>* loss, Terms<T>* sums, int64_t chunks) {
  for (int64_t task = blockIdx.x; task < in.batch * chunks; task += gridDim.x) {
    const int64_t b = task / chunks;
    T td = 0, base = 0;
    compute<NORM, vec>(in, chunk_at(in, b, task % chunks * kChunk), b, td, base);
    block_sum<kThreads>(td, base);
    if (threadIdx.x == 0) {
      if (sums) {
        sums[task] = {td, base};
      } else {
        loss[b] = weighted_mean<T>(in.coef[b], {td, base}, in.n);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_kernel(const Terms<T>* sums,
                                                                const Coef* coef,
                                                                Terms<T>* loss,
                                                                int64_t batch,
                                                                int64_t n,
                                                                int64_t chunks) {
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    double td = 0, base = 0;
    for (int64_t c = threadIdx.x; c < chunks; c += kThreads) {
      td += sums[b * chunks + c].td;
      base += sums[b * chunks + c].base;
    }
    block_sum<kThreads>(td, base);
    if (threadIdx.x == 0) loss[b] = weighted_mean<T>(coef[b], {td, base}, n);
  }
}

// Whether forward's dF, which is for an upstream gradient of 1, is not yet what is asked for.
template <typename N, typename D>
__device__ __forceinline__ bool differs(const TdLossRows<N, D>& in, int64_t b) {
  return in.upstream[b].td != 1 || in.upstream[b].base != 1;
}

template <Norm NORM, int vec, typename N, typename D>
__device__ __forceinline__ void correct(const TdLossRows<N, D>& in, int64_t b, int64_t begin) {
  using T = typename TdLossRows<N, D>::T;
  const Chunk<N, D> c = chunk_at(in, b, begin);
  const Terms<T> g = in.upstream[b];
  // half precision is computed anew: before a loss scale, dF may have underflowed
  if constexpr (std::is_same_v<N, T>) {
    if (g.td == g.base && g.td != 0) {
      for (int i = threadIdx.x; i < c.count; i += kThreads) c.dF[i] *= g.td;
      return;
    }
  }
  T td = 0, base = 0;
  compute<NORM, vec>(in, c, b, td, base);
}

// A block's `group` tasks, which its threads look at together before they work on any.
template <Norm NORM, int vec, typename N, typename D>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(TdLossRows<N, D> in, int64_t chunks, int64_t group) {
  const int64_t first = blockIdx.x * group, tasks = in.batch * chunks;
  const int64_t last = first + group < tasks ? first + group : tasks;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t mine = start + threadIdx.x;
    const int64_t end = start + kThreads < last ? start + kThreads : last;
    if (!__syncthreads_or(mine < end && differs(in, mine / chunks))) continue;
    for (int64_t task = start; task < end; ++task) {
      const int64_t b = task / chunks;
      if (differs(in, b)) correct<NORM, vec>(in, b, task % chunks * kChunk);
    }
  }
}

template <typename N, typename D>
constexpr int kVec = 16 / (sizeof(N) < sizeof(D) ? sizeof(N) : sizeof(D));

template <typename N, typename D>
bool packed(const TdLossRows<N, D>& in) {
  const auto fits = [](const auto& rows) { return packs_fit(rows.data, rows.stride, kVec<N, D>); };
  return fits(in.F) && fits(in.F_p) && fits(in.x0) && fits(in.x_t) && fits(in.x_tp) && fits(in.dF);
}

template <Norm NORM, typename N, typename D, typename T = typename TdLossRows<N, D>::T>
auto forward_of(const TdLossRows<N, D>& in) {
  return packed(in) ? forward_kernel<NORM, kVec<N, D>, N, D, T> : forward_kernel<NORM, 1, N, D, T>;
}

template <Norm NORM, typename N, typename D>
auto backward_of(const TdLossRows<N, D>& in) {
  return packed(in) ? backward_kernel<NORM, kVec<N, D>, N, D> : backward_kernel<NORM, 1, N, D>;
}

int64_t chunks_per_sample(int64_t n) { return std::max<int64_t>(1, (n + kChunk - 1) / kChunk); }

std::tuple<Tensor, Tensor> td_loss(Tensor out,
                                   Tensor out_target,
                                   Tensor x0,
                                   Tensor coef,
                                   std::optional<Tensor> x_t,
                                   std::optional<Tensor> x_tp,
                                   bool consistency,
                                   bool l1,
                                   bool want_grad) {
  const Launch launch(out);
  const Tensor layout = empty_rows_like(out);
  const Tensor grad = want_grad ? layout : torch::stable::new_empty(out, {0});
  const TdLossInputs in =
      td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, l1, layout);
  const ScalarType wide =
      x0.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(out, {in.batch, 2}, wide);
  const int64_t chunks = chunks_per_sample(in.n);
  const Tensor sums = torch::stable::new_empty(out, {chunks > 1 ? in.batch * chunks : 0, 2}, wide);
  if (in.batch == 0) return {loss, grad};
  by_storage<__nv_bfloat16, __half>(
      "td_loss", out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
        using N = decltype(net);
        using D = decltype(data);
        using T = typename TdLossRows<N, D>::T;
        const TdLossRows<N, D> view = td_loss_rows<N, D>(in, want_grad ? &grad : nullptr, nullptr);
        auto* to = static_cast<Terms<T>*>(loss.data_ptr());
        auto* partial = chunks > 1 ? static_cast<Terms<T>*>(sums.data_ptr()) : nullptr;
        const auto kernel =
            in.norm == Norm::l1 ? forward_of<Norm::l1>(view) : forward_of<Norm::l2>(view);
        launch("td_loss", kernel, grid_of(in.batch * chunks), view, to, partial, chunks);
        if (partial)
          launch("td_loss", sum_kernel<T>, grid_of(in.batch), partial, view.coef, to, in.batch,
                 in.n, chunks);
      });
  return {loss, grad};
}

// dF holds the gradient for an upstream gradient of 1. Corrects the samples whose upstream gradient
// is another.
void td_loss_backward_(Tensor grad,
                       Tensor upstream,
                       Tensor out,
                       Tensor out_target,
                       Tensor x0,
                       Tensor coef,
                       std::optional<Tensor> x_t,
                       std::optional<Tensor> x_tp,
                       bool consistency,
                       bool l1) {
  const Launch launch(grad);
  const TdLossInputs in =
      td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, l1, grad);
  check_backward(grad, upstream, in);
  if (in.batch * in.n == 0) return;
  by_storage<__nv_bfloat16, __half>(
      "td_loss", out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
        using N = decltype(net);
        using D = decltype(data);
        const TdLossRows<N, D> view = td_loss_rows<N, D>(in, &grad, &upstream);
        const auto kernel =
            in.norm == Norm::l1 ? backward_of<Norm::l1>(view) : backward_of<Norm::l2>(view);
        const int64_t chunks = chunks_per_sample(in.n);
        const int64_t tasks = in.batch * chunks;
        const int64_t group = (tasks + kBackwardBlocks - 1) / kBackwardBlocks;
        launch("td_loss_backward_", kernel, static_cast<int>((tasks + group - 1) / group), view,
               chunks, group);
      });
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("td_loss.cuda", TORCH_BOX(&tdkern::td_loss));
  m.impl("td_loss_backward_.cuda", TORCH_BOX(&tdkern::td_loss_backward_));
}
