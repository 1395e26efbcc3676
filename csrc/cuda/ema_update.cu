// ema_update_ on CUDA: a block a chunk of a parameter; its averages two at a time, so that their loads are in flight together.
#include "ema_update.h"
#include "tensor_table.cuh"

namespace tdkern {
namespace {

constexpr int kAverages = 16;  // in one launch

// Read on the device, at each replay of a graph, or else from the arguments.
struct Decays {
  const double* device;
  double host[kAverages];
};

template <int K, int vec, typename N, typename D, typename T>
__device__ __forceinline__ void elements(const N* param, D* const (&avg)[K], const T (&weight)[K], int i) {
  const Pack<N, vec> p = load_pack<vec>(param + i);
  Pack<D, vec> a[K];
#pragma unroll
  for (int k = 0; k < K; ++k) a[k] = load_pack<vec>(avg[k] + i);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int lane = 0; lane < vec; ++lane) a[k].lane[lane] = narrow<D, T>(ema_element<T, T>(widen(a[k].lane[lane]), widen(p.lane[lane]), weight[k]));
    store_pack<vec>(avg[k] + i, a[k]);
  }
}

template <int K, typename N, typename D>
__device__ __forceinline__ void averages(const TableChunk& c, const Decays& decays, int first) {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  constexpr int vec = 16 / sizeof(N);
  const N* param = static_cast<const N*>(c.row[0]) + c.begin;
  bool aligned = packs_start(param);
  D* avg[K];
  T weight[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    avg[k] = static_cast<D*>(c.row[1 + first + k]) + c.begin;
    aligned = aligned && packs_start(avg[k]);
    weight[k] = static_cast<T>(1 - (decays.device ? decays.device[first + k] : decays.host[first + k]));
  }
  const int packed = aligned ? c.count / vec * vec : 0;
#pragma unroll 2
  for (int i = threadIdx.x * vec; i < packed; i += kThreads * vec) elements<K, vec>(param, avg, weight, i);
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < c.count; i += kThreads) elements<K, 1>(param, avg, weight, i);
}

template <typename N, typename D>
__global__ void __launch_bounds__(kThreads, kBlocks) ema_kernel(const __grid_constant__ TensorTable table, const __grid_constant__ Decays decays) {
  const TableChunk chunk = table_chunk(table);
  const int K = table.columns - 1;
  int k = 0;
#pragma unroll 1
  for (; k + 2 <= K; k += 2) averages<2, N, D>(chunk, decays, k);
  if (k < K) averages<1, N, D>(chunk, decays, k);
}

void ema_update_(std::vector<Tensor> averages, std::vector<Tensor> params, Tensor decays) {
  const Tensor wide = ema_decays(decays, averages, params);
  if (averages.empty()) return;
  STD_TORCH_CHECK(wide.is_cpu() || wide.device() == params[0].device(), "ema_update_: decays must be on the CPU or on the parameters' device");
  const Launch launch(params[0]);
  const auto* values = static_cast<const double*>(wide.data_ptr());
  for (int64_t k = 0; k < wide.size(0); k += kAverages) {
    const int64_t end = std::min(k + kAverages, wide.size(0));
    TensorLists lists = ema_lists(averages, params, k, end);
    Decays group = {};
    if (wide.is_cpu()) {
      std::copy(values + k, values + end, group.host);
    } else {
      group.device = values + k;
    }
    each_table(lists, [&](const TensorLists::Row& row, const TensorTable& table) {
      by_list_storage<__nv_bfloat16, __half>("ema_update_", row.first, row.last, [&](auto param, auto average) {
        ema_kernel<decltype(param), decltype(average)><<<table.first[table.tensors], kThreads, 0, launch.stream>>>(table, group);
        check_launch("ema_update_");
      });
    });
    lists.finish();
  }
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, CUDA, m) { m.impl("ema_update_.cuda", TORCH_BOX(&tdkern::ema_update_)); }
