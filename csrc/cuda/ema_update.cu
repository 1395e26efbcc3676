// ema_update_ on CUDA: one block per chunk of a parameter; its averages two at a time, so that
// their loads are in flight together.
#include "ema_chunk.cuh"
#include "ema_update.h"
#include "tensor_table.cuh"

namespace tdkern {
namespace {

template <typename N, typename D>
__global__ void __launch_bounds__(kThreads, std::is_same_v<D, float> ? 4 : kBlocks)
    ema_kernel(const __grid_constant__ TensorTable table, const __grid_constant__ Decays decays) {
  const TableChunk chunk = table_chunk(table);
  ema_chunk<N, D>(chunk.row, chunk, decays, table.columns - 1);
}

void ema_update_(std::vector<Tensor> averages, std::vector<Tensor> params, Tensor decays) {
  const Tensor wide = list_decays("ema_update_", decays);
  STD_TORCH_CHECK(averages.size() == wide.size(0) * params.size(),
                  "ema_update_: averages must hold K lists of as many tensors as params");
  if (averages.empty()) return;
  STD_TORCH_CHECK(wide.is_cpu() || wide.device() == params[0].device(),
                  "ema_update_: decays must be on the CPU or on the parameters' device");
  const Launch launch(params[0]);
  for (int64_t k = 0; k < wide.size(0); k += kAverages) {
    const int64_t end = std::min(k + kAverages, wide.size(0));
    TensorLists lists = ema_lists(averages, params, k, end);
    const Decays group = make_decays(wide, k, end);
    each_table(lists, [&](const TensorLists::Row& row, const TensorTable& table) {
      if (table.first[table.tensors] == 0) return;
      by_storage<__nv_bfloat16, __half>(
          "ema_update_", row.first, row.last, [&](auto param, auto average) {
            launch("ema_update_", ema_kernel<decltype(param), decltype(average)>,
                   table.first[table.tensors], table, group);
          });
    });
    lists.finish();
  }
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("ema_update_.cuda", TORCH_BOX(&tdkern::ema_update_));
}
