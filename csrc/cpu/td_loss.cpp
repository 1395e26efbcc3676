// td_loss on the CPU: one pass over the samples, in chunks of a fixed size so that the order of
// summation, and with it every bit of the result, is the same for any number of threads.
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>

#include "td_loss.h"
#include "vec.h"

namespace tdkern {

enum class Store { none, cached, streamed };

// N: storage of the network's outputs and of dF, D: of the data, T: arithmetic.
template <typename N, typename D>
struct Chunk {  // elements [0, n) of one sample
  using T = typename TdLossRows<N, D>::T;
  const N *F, *F_p;
  const D *x0, *x_t, *x_tp;
  N* dF;
  int64_t n;
  Sample<T> sample;
  bool td, base, consistency;
  Store store;
  Terms<double> sums = {0, 0};  // out
};

namespace TDKERN_ISA {

template <bool TD, Norm BASE, bool CONSISTENCY, Store kStore, typename N, typename D>
TDKERN_INLINE void loop(Chunk<N, D>& chunk) {
  using T = typename Chunk<N, D>::T;
  const Chunk<N, D> c = chunk;
  Vec<T> sum_td = {}, sum_base = {};
  for_each_vector<T>(0, c.n, [&](int64_t i, auto... count) __attribute__((always_inline)) {
    Vec<T> F_p = {}, x_tp = {};
    if constexpr (TD || CONSISTENCY) {
      F_p = load<T>(c.F_p + i, count...);
      x_tp = load<T>(c.x_tp + i, count...);
    }
    const Vec<T> F = load<T>(c.F + i, count...);
    const Vec<T> x0 = load<T>(c.x0 + i, count...);
    const Vec<T> x_t = load<T>(c.x_t + i, count...);
    const Vec<T> dF =
        td_element<TD, BASE, CONSISTENCY>(c.sample, F, F_p, x0, x_t, x_tp, sum_td, sum_base);
    if constexpr (kStore == Store::streamed && sizeof...(count) == 0) {
      stream<T>(c.dF + i, dF);
    } else if constexpr (kStore != Store::none) {
      store<T>(c.dF + i, dF, count...);
    }
  });
  chunk.sums = {sum(sum_td), sum(sum_base)};
}

template <Norm NORM, Store kStore, typename N, typename D>
TDKERN_INLINE void terms(Chunk<N, D>& c) {
  if (c.td && c.base)
    return c.consistency ? loop<true, NORM, true, kStore>(c) : loop<true, NORM, false, kStore>(c);
  if (c.td) return loop<true, Norm::none, false, kStore>(c);
  if (c.base)
    return c.consistency ? loop<false, NORM, true, kStore>(c) : loop<false, NORM, false, kStore>(c);
  if (kStore != Store::none) memset(c.dF, 0, c.n * sizeof(N));
}

template <Norm NORM, typename N, typename D>
void run(Chunk<N, D>& c) {
  if (c.store == Store::none) return terms<NORM, Store::none>(c);
  return c.store == Store::cached ? terms<NORM, Store::cached>(c) : terms<NORM, Store::streamed>(c);
}

template <typename T>
void scale(T* dF, int64_t n, T g) {
  for (int64_t i = 0; i < n; ++i) dF[i] *= g;
}

#define TDKERN_RUN(N, D)                           \
  template void run<Norm::l2, N, D>(Chunk<N, D>&); \
  template void run<Norm::l1, N, D>(Chunk<N, D>&);
TDKERN_RUN(float, float)
TDKERN_RUN(double, double)
TDKERN_RUN(BFloat16, BFloat16)
TDKERN_RUN(Half, Half)
TDKERN_RUN(BFloat16, float)
TDKERN_RUN(Half, float)
template void scale<float>(float*, int64_t, float);
template void scale<double>(double*, int64_t, double);

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
TDKERN_EACH_ISA(template <Norm, typename N, typename D> void run(Chunk<N, D>&);
                template <typename T>
                void scale(T*, int64_t, T);)

namespace {

constexpr int64_t kChunk = 8192;   // elements; sets the order of summation
constexpr int64_t kGrain = 32768;  // elements worth a thread

// count: the elements of all of dF, which begins somewhere before `part`.
template <typename N>
Store how_to_store(const N* part, int64_t count) {
  if (part == nullptr) return Store::none;
  const bool large = count * static_cast<int64_t>(sizeof(N)) >= kNonTemporalBytes;
  const bool aligned = reinterpret_cast<uintptr_t>(part) % 64 == 0;
  return large && aligned ? Store::streamed : Store::cached;
}

// Elements from `begin` of sample b.
template <typename N, typename D>
Chunk<N, D> make_chunk(const TdLossRows<N, D>& in, Norm norm, int64_t b, int64_t begin) {
  using T = typename Chunk<N, D>::T;
  const auto at = [&](const auto& rows) { return rows.data + b * rows.stride + begin; };
  const Coef& coef = in.coef[b];
  const Terms<double> upstream = in.gradient(b);
  N* dF = in.dF.data ? at(in.dF) : nullptr;
  return {.F = at(in.F),
          .F_p = at(in.F_p),
          .x0 = at(in.x0),
          .x_t = at(in.x_t),
          .x_tp = at(in.x_tp),
          .dF = dF,
          .n = std::min(in.n - begin, kChunk),
          .sample = make_sample<T>(norm, coef, in.n, upstream, in.has_x_t, in.has_x_tp),
          .td = coef.w_td != 0 && upstream.td != 0,
          .base = coef.w_base != 0 && upstream.base != 0,
          .consistency = in.consistency,
          .store = how_to_store(dF, in.batch * in.n)};
}

int64_t chunks_per_sample(int64_t n) { return (n + kChunk - 1) / kChunk; }

// Calls fn(sample, chunk).
template <typename Fn>
void each_chunk(int64_t batch, int64_t n, const Fn& fn) {
  const int64_t chunks = chunks_per_sample(n);
  if (batch * chunks == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(n, kChunk));
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(task / chunks, task % chunks);
    fence();
  });
}

std::tuple<Tensor, Tensor> td_loss(Tensor out,
                                   Tensor out_target,
                                   Tensor x0,
                                   Tensor coef,
                                   std::optional<Tensor> x_t,
                                   std::optional<Tensor> x_tp,
                                   bool consistency,
                                   bool l1,
                                   bool want_grad) {
  const Tensor layout = empty_rows_like(out);
  const Tensor grad = want_grad ? layout : torch::stable::new_empty(out, {0});
  const TdLossInputs in =
      td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, l1, layout);
  const ScalarType wide =
      x0.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(out, {in.batch, 2}, wide);
  const int64_t chunks = chunks_per_sample(in.n);
  const auto sums = std::make_unique<Terms<double>[]>(in.batch * chunks);
  by_storage<BFloat16, Half>(
      "td_loss", out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
        using N = decltype(net);
        using D = decltype(data);
        const TdLossRows<N, D> view = td_loss_rows<N, D>(in, want_grad ? &grad : nullptr, nullptr);
        const auto compute = in.norm == Norm::l1 ? TDKERN_PICK(run<Norm::l1, N, D>)
                                                 : TDKERN_PICK(run<Norm::l2, N, D>);
        each_chunk(in.batch, in.n, [&](int64_t b, int64_t c) {
          Chunk<N, D> chunk = make_chunk(view, in.norm, b, c * kChunk);
          compute(chunk);
          sums[b * chunks + c] = chunk.sums;
        });
        auto* to = static_cast<Terms<typename Chunk<N, D>::T>*>(loss.data_ptr());
        for (int64_t b = 0; b < in.batch; ++b) {
          Terms<double> sum = {0, 0};
          for (int64_t c = 0; c < chunks; ++c) {
            sum.td += sums[b * chunks + c].td;
            sum.base += sums[b * chunks + c].base;
          }
          to[b] = weighted_mean<typename Chunk<N, D>::T>(view.coef[b], sum, in.n);
        }
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
  const TdLossInputs in =
      td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, l1, grad);
  check_backward(grad, upstream, in);
  by_storage<BFloat16, Half>(
      "td_loss", out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
        using N = decltype(net);
        using D = decltype(data);
        using T = typename Chunk<N, D>::T;
        const TdLossRows<N, D> view = td_loss_rows<N, D>(in, &grad, &upstream);
        const auto compute = in.norm == Norm::l1 ? TDKERN_PICK(run<Norm::l1, N, D>)
                                                 : TDKERN_PICK(run<Norm::l2, N, D>);
        each_chunk(in.batch, in.n, [&](int64_t b, int64_t c) {
          const Terms<T> g = view.upstream[b];
          if (g.td == 1 && g.base == 1) return;
          Chunk<N, D> chunk = make_chunk(view, in.norm, b, c * kChunk);
          // half precision is computed anew: before a loss scale, dF may have underflowed
          if constexpr (std::is_same_v<N, T>) {
            if (g.td == g.base && g.td != 0) return TDKERN_PICK(scale<T>)(chunk.dF, chunk.n, g.td);
          }
          compute(chunk);
        });
      });
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("td_loss.cpp", TORCH_BOX(&tdkern::td_loss));
  m.impl("td_loss_backward_.cpp", TORCH_BOX(&tdkern::td_loss_backward_));
}
#endif
