// ema_update_ on the CPU: chunks of all tensors over the threads, the averages one after the other
// while a chunk's parameter is in the cache.
#include "ema_update.h"
#include "ema_chunk.h"
#include "tensor_chunks.h"
#include "vec.h"

namespace tdkern {
namespace TDKERN_ISA {

template <typename N, typename D>
void ema_chunk(void* const* row, const double* decays, int64_t K, int64_t begin, int64_t n) {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  const N* param = static_cast<const N*>(row[0]) + begin;
  for (int64_t k = 0; k < K; ++k) {
    D* avg = static_cast<D*>(row[1 + k]) + begin;
    const T weight = static_cast<T>(1 - decays[k]);
    for_each_vector<T>(0, n, [&](int64_t i, auto... count) __attribute__((always_inline)) {
      store<T>(avg + i,
               ema_element<T>(load<T>(avg + i, count...), load<T>(param + i, count...), weight),
               count...);
    });
  }
}

#define TDKERN_EMA(N, D) \
  template void ema_chunk<N, D>(void* const*, const double*, int64_t, int64_t, int64_t);
TDKERN_EMA(float, float)
TDKERN_EMA(double, double)
TDKERN_EMA(BFloat16, BFloat16)
TDKERN_EMA(Half, Half)
TDKERN_EMA(BFloat16, float)
TDKERN_EMA(Half, float)

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
namespace {

void ema_update_(std::vector<Tensor> averages, std::vector<Tensor> params, Tensor decays) {
  const Tensor wide = list_decays("ema_update_", decays);
  const int64_t K = wide.size(0);
  STD_TORCH_CHECK(averages.size() == K * params.size(),
                  "ema_update_: averages must hold K lists of as many tensors as params");
  if (K == 0 || params.empty()) return;
  STD_TORCH_CHECK(wide.is_cpu(),
                  "ema_update_: decays must be on the CPU or on the parameters' device");
  TensorLists lists = ema_lists(averages, params, 0, K);
  const std::vector<EmaChunk> compute = ema_chunks("ema_update_", lists);
  const auto* values = static_cast<const double*>(wide.data_ptr());
  each_list_chunk(lists, [&](size_t row, int64_t begin, int64_t count) {
    compute[row](lists.row(row), values, K, begin, count);
  });
  lists.finish();
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("ema_update_.cpp", TORCH_BOX(&tdkern::ema_update_));
}
#endif
