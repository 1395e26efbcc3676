// adam_ema_ on the CPU: chunks of all tensors over the threads; a chunk's averages follow its step
// while the parameter is in the cache.
#include <atomic>
#include <limits>

#include "adam_ema.h"
#include "ema_chunk.h"
#include "tensor_chunks.h"
#include "vec.h"

namespace tdkern {

using Finite = bool (*)(const void* data, double grad_factor, int64_t begin, int64_t n);
using AdamChunk = void (*)(void* const* row,
                           const AdamStep<double>& step,
                           int64_t begin,
                           int64_t n);

template <typename N>
constexpr double kLargest = std::numeric_limits<N>::max();
template <>
constexpr double kLargest<BFloat16> = 0x1.fep127;
template <>
constexpr double kLargest<Half> = 65504;

namespace TDKERN_ISA {

// Whether every element's square is finite as the second moment is stored, one by one.
template <typename N, typename T>
bool each_finite(const N* grad, T factor, int64_t n) {
  Vec<T> zero = {};  // NaN where a square is not finite
  for_each_vector<T>(0, n, [&](int64_t i, auto... count) __attribute__((always_inline)) {
    const Vec<T> square = grad_square(load<T>(grad + i, count...), factor);
    zero += T(0) * widen<T, N>(narrow<T, N>(square));
  });
  return sum(zero) == 0;
}

// The same, by the sum of all squares, which alone is mostly small enough.
template <typename N>
bool finite(const void* data, double grad_factor, int64_t begin, int64_t n) {
  using T = std::conditional_t<std::is_same_v<N, double>, double, float>;
  const N* grad = static_cast<const N*>(data) + begin;
  Vec<T> squares[4] = {};  // four, so that an addition need not wait for the one before
  const auto add = [&](int j, auto... from) __attribute__((always_inline)) {
    const Vec<T> g = load<T>(from...);
    squares[j] += g * g;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>)
    for (int j = 0; j < 4; ++j) add(j, grad + i + j * kLanes<T>);
  for (; i < n; i += kLanes<T>) add(0, grad + i, std::min<int64_t>(kLanes<T>, n - i));
  const double all = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const bool small = all * grad_factor * grad_factor < kLargest<N> / 2;
  // by a larger factor a square that vanished in the sum could count
  if (small && std::fabs(grad_factor) < 1e20) return true;
  return each_finite(grad, static_cast<T>(grad_factor), n);
}

template <typename N>
void adam_chunk(void* const* row, const AdamStep<double>& wide, int64_t begin, int64_t n) {
  using T = std::conditional_t<std::is_same_v<N, double>, double, float>;
  const AdamStep<T> s = narrow_step<T>(wide);
  const N* grad = static_cast<const N*>(row[0]) + begin;
  N *exp_avg = static_cast<N*>(row[1]) + begin, *exp_avg_sq = static_cast<N*>(row[2]) + begin,
    *param = static_cast<N*>(row[3]) + begin;
  for_each_vector<T>(0, n, [&](int64_t i, auto... count) __attribute__((always_inline)) {
    Vec<T> p = load<T>(param + i, count...), m = load<T>(exp_avg + i, count...),
           v = load<T>(exp_avg_sq + i, count...);
    adam_element(s, load<T>(grad + i, count...), p, m, v);
    store<T>(exp_avg + i, m, count...);
    store<T>(exp_avg_sq + i, v, count...);
    store<T>(param + i, p, count...);
  });
}

#define TDKERN_ADAM(N)                                            \
  template bool finite<N>(const void*, double, int64_t, int64_t); \
  template void adam_chunk<N>(void* const*, const AdamStep<double>&, int64_t, int64_t);
TDKERN_ADAM(float)
TDKERN_ADAM(double)
TDKERN_ADAM(BFloat16)
TDKERN_ADAM(Half)

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
TDKERN_EACH_ISA(template <typename N> bool finite(const void*, double, int64_t, int64_t);
                template <typename N>
                void adam_chunk(void* const*, const AdamStep<double>&, int64_t, int64_t);)

namespace {

// Of scalars that are on the CPU, as its launchers need them.
GradFactor grad_factor(const char* op,
                       const std::optional<Tensor>& grad_scale,
                       const std::optional<Tensor>& clip) {
  for (const auto* scalar : {&grad_scale, &clip})
    STD_TORCH_CHECK(!*scalar || (*scalar)->is_cpu(), op,
                    ": a scalar must be on the CPU or on the gradients' device");
  return {number(op, "grad_scale", grad_scale), number(op, "clip", clip)};
}

Tensor found_inf(std::vector<Tensor> grads,
                 std::optional<Tensor> grad_scale,
                 std::optional<Tensor> clip) {
  STD_TORCH_CHECK(!grads.empty(), "found_inf: grads must hold a tensor");
  TensorLists lists(1, grads.size());
  std::vector<Finite> check;
  for (const Tensor& grad : grads) {
    const Tensor* row[] = {&grad};
    lists.add("found_inf", row);
    by_storage<BFloat16, Half>(
        "found_inf", grad.scalar_type(), grad.scalar_type(),
        [&](auto storage, auto) { check.push_back(TDKERN_PICK(finite<decltype(storage)>)); });
  }
  const double factor = grad_factor("found_inf", grad_scale, clip).value();
  std::atomic<bool> all{true};
  each_list_chunk(lists, [&](size_t row, int64_t begin, int64_t count) {
    if (!check[row](lists.row(row)[0], factor, begin, count))
      all.store(false, std::memory_order_relaxed);
  });
  Tensor found = torch::stable::new_empty(grads[0], {}, ScalarType::Float);
  *static_cast<float*>(found.data_ptr()) = all ? 0 : 1;
  return found;
}

void adam_ema_(std::vector<Tensor> params,
               std::vector<Tensor> grads,
               std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs,
               std::vector<Tensor> steps,
               std::vector<Tensor> averages,
               Tensor decays,
               Tensor lr,
               Tensor found_inf,
               std::optional<Tensor> grad_scale,
               std::optional<Tensor> clip,
               std::optional<Tensor> skipped,
               double beta1,
               double beta2,
               double eps,
               double weight_decay,
               bool decoupled) {
  const Tensor wide = list_decays("adam_ema_", decays);
  const int64_t K = wide.size(0);
  TensorLists lists = adam_lists(params, grads, exp_avgs, exp_avg_sqs, steps, averages, K);
  for (const auto& scalar :
       {std::optional(wide), std::optional(lr), std::optional(found_inf), skipped})
    STD_TORCH_CHECK(!scalar || scalar->is_cpu(),
                    "adam_ema_: a scalar must be on the CPU or on the parameters' device");
  int64_t* count = skipped ? counter(*skipped) : nullptr;
  const double factor = grad_factor("adam_ema_", grad_scale, clip).value();
  if (number("adam_ema_", "found_inf", found_inf).value() != 0 || !std::isfinite(factor)) {
    if (count) ++*count;
    return;
  }
  std::vector<AdamChunk> compute;
  for (const auto& row : lists.rows)
    by_storage<BFloat16, Half>("adam_ema_", row.first, row.last, [&](auto param, auto) {
      compute.push_back(TDKERN_PICK(adam_chunk<decltype(param)>));
    });
  const std::vector<EmaChunk> average = ema_chunks("adam_ema_", lists);
  const AdamOptions options = {.beta1 = beta1,
                               .beta2 = beta2,
                               .eps = eps,
                               .weight_decay = weight_decay,
                               .decoupled = decoupled};
  const double rate = number("adam_ema_", "lr", lr).value();
  std::vector<AdamStep<double>> constants;  // nothing can fail from here on: the steps count
  for (size_t i = 0; i < params.size(); ++i)
    constants.push_back(
        make_adam_step(options, rate, factor, ++*static_cast<float*>(lists.row(i)[lists.columns])));
  const auto* values = static_cast<const double*>(wide.data_ptr());
  each_list_chunk(lists, [&](size_t i, int64_t begin, int64_t count) {
    compute[i](lists.row(i), constants[i], begin, count);
    average[i](lists.row(i) + kAdamColumns - 1, values, K, begin, count);
  });
  lists.finish();
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("found_inf.cpp", TORCH_BOX(&tdkern::found_inf));
  m.impl("adam_ema_.cpp", TORCH_BOX(&tdkern::adam_ema_));
}
#endif
