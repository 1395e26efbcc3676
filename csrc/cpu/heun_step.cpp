// heun_step on the CPU: one pass over flat arrays.
#include <tuple>

#include "heun_step.h"
#include "vec.h"

namespace tdkern {

namespace TDKERN_ISA {

// Elements [begin, end).
template <bool streamed, typename N, typename D, typename I>
TDKERN_INLINE void loop(const HeunArrays<N, D, I>& in,
                        const Step<D>& step,
                        int64_t begin,
                        int64_t end) {
  const HeunArrays<N, D, I> a = in;
  const Step<D> s = step;
  for_each_vector<D>(begin, end, [&](int64_t i, auto... count) __attribute__((always_inline)) {
    Vec<D> x_hat = {}, noise = {};
    if (a.x_hat) x_hat = load<D>(a.x_hat + i, count...);
    if (a.noise) noise = load<D>(a.noise + i, count...);
    const Vec<D> x_next =
        step_element(s, load<D>(a.F + i, count...), load<D>(a.x + i, count...), x_hat, noise);
    if constexpr (streamed && sizeof...(count) == 0) {
      stream<D>(a.x_next + i, x_next);
      if (a.net_input) stream<D>(a.net_input + i, s.c_in * x_next);
    } else {
      store<D>(a.x_next + i, x_next, count...);
      if (a.net_input) store<D>(a.net_input + i, s.c_in * x_next, count...);
    }
  });
}

template <typename N, typename D, typename I>
void run(
    const HeunArrays<N, D, I>& in, const Step<D>& step, bool streamed, int64_t begin, int64_t end) {
  return streamed ? loop<true>(in, step, begin, end) : loop<false>(in, step, begin, end);
}

#define TDKERN_RUN(N, D, I) \
  template void run<N, D, I>(const HeunArrays<N, D, I>&, const Step<D>&, bool, int64_t, int64_t);
#define TDKERN_RUN_INPUTS(N, D) \
  TDKERN_RUN(N, D, float) TDKERN_RUN(N, D, double) TDKERN_RUN(N, D, BFloat16) TDKERN_RUN(N, D, Half)
#define TDKERN_RUN_NETS(D)    \
  TDKERN_RUN_INPUTS(float, D) \
  TDKERN_RUN_INPUTS(double, D) TDKERN_RUN_INPUTS(BFloat16, D) TDKERN_RUN_INPUTS(Half, D)
TDKERN_RUN_NETS(float)
TDKERN_RUN_NETS(double)

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
TDKERN_EACH_ISA(template <typename N, typename D, typename I>
                void run(const HeunArrays<N, D, I>&, const Step<D>&, bool, int64_t, int64_t);)

namespace {

// Elements of a chunk. A thread has whole chunks, so that it starts at a full cache line.
constexpr int64_t kChunk = 4096;
constexpr int64_t kGrain = 8;  // chunks that are worth a thread

std::tuple<Tensor, Tensor> heun_step(Tensor F,
                                     Tensor x,
                                     Tensor coef,
                                     std::optional<Tensor> x_hat,
                                     std::optional<Tensor> noise,
                                     std::optional<ScalarType> net_dtype) {
  const HeunTensors tensors = heun_tensors(F, x, coef, x_hat, noise, net_dtype);
  by_heun_storage<BFloat16, Half>(tensors, [&](auto net, auto state, auto input) {
    using N = decltype(net);
    using D = decltype(state);
    using I = decltype(input);
    const HeunArrays<N, D, I> arrays = heun_arrays<N, D, I>(tensors);
    const Step<D> step = make_step<D>(*arrays.coef, arrays.x_hat != nullptr);
    const auto aligned = [](const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; };
    const bool streamed = arrays.n * static_cast<int64_t>(sizeof(D)) >= kNonTemporalBytes &&
                          aligned(arrays.x_next) && aligned(arrays.net_input);
    const auto compute = TDKERN_PICK(run<N, D, I>);
    if (arrays.n <= kChunk) return compute(arrays, step, false, 0, arrays.n);
    torch::stable::parallel_for(
        0, (arrays.n + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
          compute(arrays, step, streamed, begin * kChunk, std::min(end * kChunk, arrays.n));
          fence();
        });
  });
  return {tensors.x_next, tensors.net_input};
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("heun_step.cpp", TORCH_BOX(&tdkern::heun_step));
}
#endif
