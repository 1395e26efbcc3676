// adam_ema_ on CUDA: one block per chunk of a parameter, piece by piece its step and then its
// averages; a small kernel counts the step behind it. Whether the step is skipped is read on the
// device.
#include "adam_ema.h"
#include "ema_chunk.cuh"

namespace tdkern {
namespace {

// So few elements that the averages find the parameter, which they read anew, still in the cache.
constexpr int kPiece = 2048;

// Every thread that finds an element whose square, as the second moment is stored, is not finite
// writes the same 1.
template <typename N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    finite_kernel(const __grid_constant__ TensorTable table, GradFactor factor, float* found) {
  using T = std::conditional_t<std::is_same_v<N, double>, double, float>;
  const T grad_factor = static_cast<T>(factor.value());
  const TableChunk c = table_chunk(table);
  const N* grad = static_cast<const N*>(c.row[0]) + c.begin;
  constexpr int vec = 16 / sizeof(N);
  const int packed = packs_start(grad) ? c.count / vec * vec : 0;
  bool bad = false;
  const auto look = [&](T grad) {
    bad = bad || !isfinite(widen(narrow<N, T>(grad_square(grad, grad_factor))));
  };
#pragma unroll 4
  for (int i = threadIdx.x * vec; i < packed; i += kThreads * vec) {
    const Pack<N, vec> pack = load_pack<vec>(grad + i);
#pragma unroll
    for (int lane = 0; lane < vec; ++lane) look(widen(pack.lane[lane]));
  }
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < c.count; i += kThreads) look(widen(grad[i]));
  if (bad) *found = 1;
}

struct AdamArguments {
  AdamOptions options;
  Decays decays;
  Number found_inf, lr;
  GradFactor grad_factor;
  int averages;  // that this launch updates

  __device__ __forceinline__ bool skip() const {
    return found_inf.value() != 0 || !isfinite(grad_factor.value());
  }
};

template <int vec, typename N, typename T>
__device__ __forceinline__ void elements(
    const AdamStep<T>& s, const N* grad, N* exp_avg, N* exp_avg_sq, N* param, int i) {
  const Pack<N, vec> g = load_pack<vec>(grad + i);
  Pack<N, vec> m = load_pack<vec>(exp_avg + i), v = load_pack<vec>(exp_avg_sq + i),
               p = load_pack<vec>(param + i);
#pragma unroll
  for (int lane = 0; lane < vec; ++lane) {
    T p_new = widen(p.lane[lane]), m_new = widen(m.lane[lane]), v_new = widen(v.lane[lane]);
    adam_element<T, T>(s, widen(g.lane[lane]), p_new, m_new, v_new);
    m.lane[lane] = narrow<N, T>(m_new);
    v.lane[lane] = narrow<N, T>(v_new);
    p.lane[lane] = narrow<N, T>(p_new);
  }
  store_pack<vec>(exp_avg + i, m);
  store_pack<vec>(exp_avg_sq + i, v);
  store_pack<vec>(param + i, p);
}

template <typename N, typename T>
__device__ __forceinline__ void adam_piece(const AdamStep<T>& s, const TableChunk& c) {
  const N* grad = static_cast<const N*>(c.row[0]) + c.begin;
  N* exp_avg = static_cast<N*>(c.row[1]) + c.begin;
  N* exp_avg_sq = static_cast<N*>(c.row[2]) + c.begin;
  N* param = static_cast<N*>(c.row[3]) + c.begin;
  constexpr int vec = 16 / sizeof(N);
  const bool aligned =
      packs_start(grad) && packs_start(exp_avg) && packs_start(exp_avg_sq) && packs_start(param);
  const int packed = aligned ? c.count / vec * vec : 0;
#pragma unroll 1
  for (int i = threadIdx.x * vec; i < packed; i += kThreads * vec)
    elements<vec>(s, grad, exp_avg, exp_avg_sq, param, i);
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < c.count; i += kThreads)
    elements<1>(s, grad, exp_avg, exp_avg_sq, param, i);
}

template <typename N, typename D>
__global__ void __launch_bounds__(kThreads, std::is_same_v<D, double> ? 2 : kBlocks)
    adam_kernel(const __grid_constant__ TensorTable table,
                const __grid_constant__ AdamArguments a) {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;
  if (a.skip()) return;
  const TableChunk c = table_chunk(table);
  __shared__ AdamStep<double> shared;  // two powers in float64: once a block
  if (threadIdx.x == 0)
    shared = make_adam_step(a.options, a.lr.value(), a.grad_factor.value(),
                            *static_cast<const float*>(c.row[table.columns - 1]) + 1.0f);
  __syncthreads();
  const AdamStep<T> s = narrow_step<T>(shared);
#pragma unroll 1
  for (int done = 0; done < c.count; done += kPiece) {
    const TableChunk piece = {c.row, c.begin + done, c.tensor,
                              c.count - done < kPiece ? c.count - done : kPiece};
    adam_piece<N>(s, piece);
    if (a.averages == 0) continue;
    __syncthreads();  // the averages read the parameter, not always with the thread that wrote it
    ema_chunk<N, D>(c.row + kAdamColumns - 1, piece, a.decays, a.averages);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    count_kernel(const __grid_constant__ TensorTable table,
                 const __grid_constant__ AdamArguments a,
                 int64_t* skipped) {
  if (a.skip()) {
    if (skipped && threadIdx.x == 0) ++*skipped;
    return;
  }
  for (int i = threadIdx.x; i < table.tensors; i += kThreads)
    ++*static_cast<float*>(table.pointers[i * table.columns + table.columns - 1]);
}

// As the kernels take a scalar: where it is on the device, or else its value.
Number scalar(const char* op,
              const char* name,
              const std::optional<Tensor>& tensor,
              const Tensor& beside) {
  const Number number = tdkern::number(op, name, tensor);
  if (!tensor || tensor->is_cpu()) return {nullptr, false, number.value()};
  STD_TORCH_CHECK(tensor->device() == beside.device(), op, ": ", name,
                  " must be on the CPU or on the gradients' device");
  return number;
}

Tensor found_inf(std::vector<Tensor> grads,
                 std::optional<Tensor> grad_scale,
                 std::optional<Tensor> clip) {
  STD_TORCH_CHECK(!grads.empty(), "found_inf: grads must hold a tensor");
  const Launch launch(grads[0]);
  TensorLists lists(1, grads.size());
  for (const Tensor& grad : grads) {
    const Tensor* row[] = {&grad};
    STD_TORCH_CHECK(grad.device() == grads[0].device(), "found_inf: grads must be on one device");
    lists.add("found_inf", row);
  }
  const GradFactor factor = {scalar("found_inf", "grad_scale", grad_scale, grads[0]),
                             scalar("found_inf", "clip", clip, grads[0])};
  const Tensor found = torch::stable::new_zeros(grads[0], {}, ScalarType::Float);
  each_table(lists, [&](const TensorLists::Row& row, const TensorTable& table) {
    if (table.first[table.tensors] == 0) return;
    by_storage<__nv_bfloat16, __half>("found_inf", row.first, row.last, [&](auto grad, auto) {
      launch("found_inf", finite_kernel<decltype(grad)>, table.first[table.tensors], table, factor,
             static_cast<float*>(found.data_ptr()));
    });
  });
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
  if (params.empty()) return;
  const Tensor wide = list_decays("adam_ema_", decays);
  const int64_t K = wide.size(0);
  STD_TORCH_CHECK(K <= kAverages, "adam_ema_: on CUDA at most ", kAverages, " averages, got ", K);
  const auto device = params[0].device();
  STD_TORCH_CHECK(found_inf.device() == device && (!skipped || skipped->device() == device) &&
                      (wide.is_cpu() || wide.device() == device),
                  "adam_ema_: found_inf and skipped must be on the parameters' device, decays "
                  "there or on the CPU");
  const Launch launch(params[0]);
  TensorLists lists = adam_lists(params, grads, exp_avgs, exp_avg_sqs, steps, averages, K);
  const AdamArguments arguments = {
      .options = {.beta1 = beta1,
                  .beta2 = beta2,
                  .eps = eps,
                  .weight_decay = weight_decay,
                  .decoupled = decoupled},
      .decays = make_decays(wide, 0, K),
      .found_inf = number("adam_ema_", "found_inf", found_inf),
      .lr = scalar("adam_ema_", "lr", lr, params[0]),
      .grad_factor = {scalar("adam_ema_", "grad_scale", grad_scale, params[0]),
                      scalar("adam_ema_", "clip", clip, params[0])},
      .averages = static_cast<int>(K)};
  int64_t* count = skipped ? counter(*skipped) : nullptr;
  each_table(lists, [&](const TensorLists::Row& row, const TensorTable& table) {
    by_storage<__nv_bfloat16, __half>(
        "adam_ema_", row.first, row.last, [&](auto param, auto average) {
          launch("adam_ema_", adam_kernel<decltype(param), decltype(average)>,
                 table.first[table.tensors], table, arguments);
        });
    launch("adam_ema_", count_kernel, 1, table, arguments, count);
    count = nullptr;  // once a step, not once a table
  });
  lists.finish();
}

}  // namespace
}  // namespace tdkern

STABLE_TORCH_LIBRARY_IMPL(tdkern, TDKERN_CUDA_KEY, m) {
  m.impl("found_inf.cuda", TORCH_BOX(&tdkern::found_inf));
  m.impl("adam_ema_.cuda", TORCH_BOX(&tdkern::adam_ema_));
}
