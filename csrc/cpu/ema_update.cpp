// ema_update_ on the CPU: chunks of all tensors over the threads, the averages two at a time while a chunk's parameter is in the cache.
#include "ema_update.h"
#include "tensor_chunks.h"
#include "vec.h"

namespace tdkern {

// Elements of one row: row[0] the parameter, row[1 + k] average k.
using EmaChunk = void (*)(void* const* row, const double* decays, int64_t averages, int64_t begin, int64_t count);

namespace TDKERN_ISA {

template <int K, typename N, typename D>
TDKERN_INLINE void averages(const N* param, void* const* row, const double* decays, int64_t begin, int64_t n) {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  T weight[K];
  D* avg[K];
  for (int k = 0; k < K; ++k) {
    weight[k] = static_cast<T>(1 - decays[k]);
    avg[k] = static_cast<D*>(row[k]) + begin;
  }
  const auto step = [&](int64_t i, auto... count) __attribute__((always_inline)) {  // count: where fewer than a vector is left
    const Vec<T> p = load<T>(param + i, count...);
    for (int k = 0; k < K; ++k) store<T>(avg[k] + i, ema_element<T>(load<T>(avg[k] + i, count...), p, weight[k]), count...);
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) step(i);
  if (i < n) step(i, n - i);
}

template <typename N, typename D>
void ema_chunk(void* const* row, const double* decays, int64_t K, int64_t begin, int64_t n) {
  const N* param = static_cast<const N*>(row[0]) + begin;
  int64_t k = 0;
  for (; k + 2 <= K; k += 2) averages<2, N, D>(param, row + 1 + k, decays + k, begin, n);
  if (k < K) averages<1, N, D>(param, row + 1 + k, decays + k, begin, n);
}

#define TDKERN_EMA(N, D) template void ema_chunk<N, D>(void* const*, const double*, int64_t, int64_t, int64_t);
TDKERN_EMA(float, float)
TDKERN_EMA(double, double)
TDKERN_EMA(BFloat16, BFloat16)
TDKERN_EMA(Half, Half)
TDKERN_EMA(BFloat16, float)
TDKERN_EMA(Half, float)

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
namespace avx2 {
template <typename N, typename D> void ema_chunk(void* const*, const double*, int64_t, int64_t, int64_t);
}  // namespace avx2
namespace avx512 {
template <typename N, typename D> void ema_chunk(void* const*, const double*, int64_t, int64_t, int64_t);
}  // namespace avx512

namespace {

void ema_update_(std::vector<Tensor> averages, std::vector<Tensor> params, Tensor decays) {
  const Tensor wide = ema_decays(decays, averages, params);
  const int64_t K = wide.size(0);
  if (K == 0 || params.empty()) return;
  STD_TORCH_CHECK(wide.is_cpu(), "ema_update_: decays must be on the CPU or on the parameters' device");
  TensorLists lists = ema_lists(averages, params, 0, K);
  std::vector<EmaChunk> compute(params.size());
  for (size_t i = 0; i < params.size(); ++i)
    by_list_storage<BFloat16, Half>("ema_update_", lists.rows[i].first, lists.rows[i].last, [&](auto param, auto average) {
      compute[i] = TDKERN_PICK(ema_chunk<decltype(param), decltype(average)>);
    });
  const auto* values = static_cast<const double*>(wide.data_ptr());
  each_list_chunk(lists, [&](size_t row, int64_t begin, int64_t count) { compute[row](lists.pointers.data() + row * lists.columns, values, K, begin, count); });
  lists.finish();
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) { m.impl("ema_update_.cpp", TORCH_BOX(&tdkern::ema_update_)); }
#endif
