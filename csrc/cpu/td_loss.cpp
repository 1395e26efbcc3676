// td_loss on the CPU: one pass over the samples, in chunks of a fixed size so that the order of summation, and with it
// every bit of the result, is the same for any number of threads.
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>

#include "td_loss.h"
#include "vec.h"

namespace tdkern {
namespace {

constexpr int64_t kChunk = 8192;   // elements; sets the order of summation
constexpr int64_t kGrain = 32768;  // elements worth a thread

// N: storage of the network's outputs and of dF, D: of the data, T: arithmetic.
template <typename N, typename D>
struct Chunk {  // elements [0, n) of one sample
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  const N *F, *F_p;
  const D *x0, *x_t, *x_tp;
  N* dF;  // null where no gradient is wanted
  int64_t n;
  Sample<T> sample;
  bool td, base, consistency;
  double sum_td = 0, sum_base = 0;  // out
};

template <bool TD, bool BASE, bool CONSISTENCY, bool GRAD, typename N, typename D>
TDKERN_INLINE void loop(Chunk<N, D>& chunk) {
  using T = typename Chunk<N, D>::T;
  const Chunk<N, D> c = chunk;
  Vec<T> sum_td = {}, sum_base = {};
  const auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    Vec<T> F_p = {}, x_tp = {};
    if constexpr (TD || CONSISTENCY) {
      F_p = load<T>(c.F_p + i, count);
      x_tp = load<T>(c.x_tp + i, count);
    }
    const Vec<T> F = load<T>(c.F + i, count), x0 = load<T>(c.x0 + i, count), x_t = load<T>(c.x_t + i, count);
    const Vec<T> dF = td_element<TD, BASE, CONSISTENCY>(c.sample, F, F_p, x0, x_t, x_tp, sum_td, sum_base);
    if constexpr (GRAD) store<T>(c.dF + i, dF, count);
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= c.n; i += kLanes<T>) step(i, kLanes<T>);
  if (i < c.n) step(i, c.n - i);
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    chunk.sum_td += sum_td[lane];
    chunk.sum_base += sum_base[lane];
  }
}

template <bool GRAD, typename N, typename D>
TDKERN_INLINE void compute(Chunk<N, D>& c) {
  if (c.td && c.base) return c.consistency ? loop<true, true, true, GRAD>(c) : loop<true, true, false, GRAD>(c);
  if (c.td) return loop<true, false, false, GRAD>(c);
  if (c.base) return c.consistency ? loop<false, true, true, GRAD>(c) : loop<false, true, false, GRAD>(c);
  if constexpr (GRAD) memset(c.dF, 0, c.n * sizeof(N));
}

#define TDKERN_EACH_STORAGE(X) \
  X(float, float) X(double, double) X(BFloat16, BFloat16) X(Half, Half) X(BFloat16, float) X(Half, float)
// A plain function for each pair of storage types: the compiler makes no clones of templates.
#define TDKERN_RUN(N, D) \
  TDKERN_CLONES void run(Chunk<N, D>& c) { c.dF ? compute<true>(c) : compute<false>(c); }
TDKERN_EACH_STORAGE(TDKERN_RUN)

TDKERN_CLONES void scale(float* dF, int64_t n, float g) {
  for (int64_t i = 0; i < n; ++i) dF[i] *= g;
}
TDKERN_CLONES void scale(double* dF, int64_t n, double g) {
  for (int64_t i = 0; i < n; ++i) dF[i] *= g;
}

// One chunk of sample b. `upstream` is null in the forward pass: its gradient is 1 then.
template <typename N, typename D, typename T = typename Chunk<N, D>::T>
Chunk<N, D> make_chunk(const TdLossInputs& in, const Tensor& grad, const T* upstream, int64_t b, int64_t begin) {
  const auto at = [&](auto* type, const Tensor& tensor) {
    const auto r = rows<std::remove_pointer_t<decltype(type)>>(tensor);
    return r.data + b * r.stride + begin;
  };
  const double* coef = rows<double>(in.coef).data + 8 * b;
  const double g_td = upstream ? upstream[2 * b] : 1, g_base = upstream ? upstream[2 * b + 1] : 1;
  return {at((N*)0, in.F), at((N*)0, in.F_p), at((D*)0, in.x0), at((D*)0, in.x_t), at((D*)0, in.x_tp), grad.numel() ? at((N*)0, grad) : nullptr,
          std::min(in.n - begin, kChunk), make_sample<T>(coef, in.n, g_td, g_base, in.has_x_t, in.has_x_tp),
          coef[6] != 0 && g_td != 0, coef[7] != 0 && g_base != 0, in.consistency};
}

template <typename Fn>
void each_chunk(const TdLossInputs& in, const Fn& fn) {  // fn(sample, chunk)
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  if (in.batch * chunks == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(in.n, kChunk));
  torch::stable::parallel_for(0, in.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(task / chunks, task % chunks);
  });
}

std::tuple<Tensor, Tensor> td_loss(Tensor out, Tensor out_target, Tensor x0, Tensor coef, std::optional<Tensor> x_t, std::optional<Tensor> x_tp, bool consistency,
                                   bool want_grad) {
  const Tensor layout = empty_rows_like(out);
  const Tensor grad = want_grad ? layout : torch::stable::new_empty(out, {0});
  const TdLossInputs in = td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, layout);
  const bool wide = x0.scalar_type() == ScalarType::Double;
  const Tensor loss = torch::stable::new_empty(out, {in.batch, 2}, wide ? ScalarType::Double : ScalarType::Float);
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  const auto sums = std::make_unique<double[]>(2 * in.batch * chunks);
  by_storage<BFloat16, Half>(out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
    using T = typename Chunk<decltype(net), decltype(data)>::T;
    each_chunk(in, [&](int64_t b, int64_t c) {
      auto chunk = make_chunk<decltype(net), decltype(data)>(in, grad, static_cast<const T*>(nullptr), b, c * kChunk);
      run(chunk);
      sums[2 * (b * chunks + c)] = chunk.sum_td;
      sums[2 * (b * chunks + c) + 1] = chunk.sum_base;
    });
    const double* k = rows<double>(in.coef).data;
    T* to = rows<T>(loss).data;
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t term = 0; term < 2; ++term) {
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += sums[2 * (b * chunks + c) + term];
        const double weight = k[8 * b + 6 + term];
        to[2 * b + term] = static_cast<T>(weight == 0 || in.n == 0 ? 0 : weight * sum / static_cast<double>(in.n));
      }
    }
  });
  return {loss, grad};
}

// dF holds the gradient for an upstream gradient of 1. Corrects the samples whose upstream gradient is another.
void td_loss_backward_(Tensor grad, Tensor upstream, Tensor out, Tensor out_target, Tensor x0, Tensor coef, std::optional<Tensor> x_t, std::optional<Tensor> x_tp,
                       bool consistency) {
  const TdLossInputs in = td_loss_inputs(out, out_target, x0, coef, x_t, x_tp, consistency, grad);
  by_storage<BFloat16, Half>(out.scalar_type(), x0.scalar_type(), [&](auto net, auto data) {
    using N = decltype(net);
    using T = typename Chunk<N, decltype(data)>::T;
    const T* g = rows<T>(upstream).data;
    each_chunk(in, [&](int64_t b, int64_t c) {
      const T g_td = g[2 * b], g_base = g[2 * b + 1];
      if (g_td == 1 && g_base == 1) return;
      auto chunk = make_chunk<N, decltype(data)>(in, grad, g, b, c * kChunk);
      if constexpr (std::is_same_v<N, T>) {  // half precision is computed anew: before a loss scale, dF may have underflowed
        if (g_td == g_base && g_td != 0) return scale(chunk.dF, chunk.n, g_td);
      }
      run(chunk);
    });
  });
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("td_loss.cpp", TORCH_BOX(&tdkern::td_loss));
  m.impl("td_loss_backward_.cpp", TORCH_BOX(&tdkern::td_loss_backward_));
}
