// What every op does with its tensors before it computes: check them, and see each as rows, one row
// a sample.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

namespace tdkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The elements of one sample lie `data + b * stride` to `+ n`, in the order of the op's output.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

inline void check_like(
    const char* op, const char* name, const Tensor& tensor, const Tensor& out, ScalarType dtype) {
  STD_TORCH_CHECK(same_sizes(tensor, out), op, ": ", name, " must have out's shape");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == out.device(), op, ": ", name, " must be on out's device");
}

inline int64_t elements_per_sample(const Tensor& out) {
  return out.size(0) == 0 ? 0 : out.numel() / out.size(0);
}

// A block of this size or more comes from glibc as fresh pages each time. In pages of 4 KB their
// faults take several times as long as what our kernels do there, so they are asked for in pages of
// 2 MB.
inline void on_huge_pages(const Tensor& fresh) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kFresh = 32 << 20, kPage = 2 << 20;
  const uintptr_t bytes = fresh.numel() * fresh.element_size();
  if (!fresh.is_cpu() || bytes < kFresh) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kPage * kPage,
          MADV_HUGEPAGE);  // advice: where it is refused, nothing is lost
#endif
}

// The stable ABI's own empty_like takes no dtype.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(like),         from(std::optional(dtype)), from(std::nullopt),
                           from(std::nullopt), from(std::nullopt),         from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  const Tensor fresh = torch::stable::detail::to<Tensor>(stack[0]);
  on_huge_pages(fresh);
  return fresh;
}

// An empty tensor in out's own layout if that keeps samples apart in memory, else contiguous;
// gradient_like in tdkern/ops/td_loss.py is the same.
inline Tensor empty_rows_like(const Tensor& out) {
  Tensor grad = empty_like(out, out.scalar_type());
  const bool apart =
      out.dim() == 1 || out.size(0) <= 1 || grad.stride(0) == elements_per_sample(out);
  return apart ? grad : torch::stable::new_empty(out, out.sizes());
}

// `tensor` if each of its samples is laid out as `layout`'s are, at any distance from the next;
// else a copy that is.
inline Tensor as_rows(const Tensor& tensor, const Tensor& layout) {
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != layout.stride(d)) {
      Tensor copy = empty_like(layout, tensor.scalar_type());
      return torch::stable::copy_(copy, tensor);
    }
  }
  return tensor;
}

template <typename T>
Rows<T> rows(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0) > 1 ? tensor.stride(0) : 0};
}

// Calls fn(N{}, D{}): N the storage of what may be narrow (a network's output, a parameter), D that
// of what goes with it (the data, its averages).
template <typename BF16, typename F16, typename Fn>
void by_storage(const char* op, ScalarType narrow, ScalarType wide, const Fn& fn) {
  if (narrow == ScalarType::Float && wide == narrow) return fn(float{}, float{});
  if (narrow == ScalarType::Double && wide == narrow) return fn(double{}, double{});
  if (narrow == ScalarType::BFloat16 && wide == narrow) return fn(BF16{}, BF16{});
  if (narrow == ScalarType::Half && wide == narrow) return fn(F16{}, F16{});
  if (narrow == ScalarType::BFloat16 && wide == ScalarType::Float) return fn(BF16{}, float{});
  if (narrow == ScalarType::Half && wide == ScalarType::Float) return fn(F16{}, float{});
  STD_TORCH_CHECK(false, op,
                  ": tensors that belong together must have one dtype, float32, float64, bfloat16 "
                  "or float16, or be float32 beside half precision");
}

}  // namespace tdkern
