// heun_step's arguments, checked and seen as flat arrays: what the CPU's and CUDA's launchers
// share.
#pragma once

#include "checks.h"
#include "heun_step_math.h"

namespace tdkern {

struct HeunTensors {
  Tensor F, x, coef;
  std::optional<Tensor> x_hat, noise;
  Tensor x_next, net_input;  // net_input is empty where no dtype is given for it
  ScalarType input_dtype;    // that dtype, or any
};

// `tensor` if it lies in memory as the dense `layout` does; else a copy that does.
inline Tensor laid_as(const Tensor& tensor, const Tensor& layout) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != layout.stride(d)) {
      Tensor copy = empty_like(layout, tensor.scalar_type());
      return torch::stable::copy_(copy, tensor);
    }
  }
  return tensor;
}

inline HeunTensors heun_tensors(const Tensor& F,
                                const Tensor& x,
                                const Tensor& coef,
                                const std::optional<Tensor>& x_hat,
                                const std::optional<Tensor>& noise,
                                const std::optional<ScalarType>& net_dtype) {
  const ScalarType state = x.scalar_type();
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType dtype) {
    STD_TORCH_CHECK(
        same_sizes(tensor, x) && tensor.scalar_type() == dtype && tensor.device() == x.device(),
        "heun_step: ", name, " must have x's shape, dtype and device");
  };
  check("F", F, F.scalar_type());
  if (x_hat) check("x_hat", *x_hat, state);
  if (noise) check("noise", *noise, state);
  STD_TORCH_CHECK(coef.dim() == 1 && coef.size(0) == 6 &&
                      coef.scalar_type() == ScalarType::Double && coef.device() == x.device(),
                  "heun_step: coef must be float64 of shape [6] on x's device");
  const Tensor x_next = empty_like(x, state);
  const Tensor net_input = net_dtype ? empty_like(x, *net_dtype) : torch::stable::new_empty(x, {0});
  const auto laid = [&](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(laid_as(*tensor, x_next)) : std::nullopt;
  };
  return {.F = laid_as(F, x_next),
          .x = laid_as(x, x_next),
          .coef = torch::stable::contiguous(coef),
          .x_hat = laid(x_hat),
          .noise = laid(noise),
          .x_next = x_next,
          .net_input = net_input,
          .input_dtype = net_dtype.value_or(ScalarType::Float)};
}

// The same as plain pointers, for the kernels. N: storage of F, D: the state and the arithmetic, I:
// the network's input.
template <typename N, typename D, typename I>
struct HeunArrays {
  const N* F;
  const D *x, *x_hat, *noise;  // x_hat and noise are null where they are not given
  D* x_next;
  I* net_input;          // null where none is wanted
  const StepCoef* coef;  // one
  int64_t n;
};

template <typename N, typename D, typename I>
HeunArrays<N, D, I> heun_arrays(const HeunTensors& t) {
  const auto state = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const D*>(tensor->data_ptr()) : nullptr;
  };
  const bool wanted = t.net_input.numel() > 0;
  return {.F = static_cast<const N*>(t.F.data_ptr()),
          .x = static_cast<const D*>(t.x.data_ptr()),
          .x_hat = state(t.x_hat),
          .noise = state(t.noise),
          .x_next = static_cast<D*>(t.x_next.data_ptr()),
          .net_input = wanted ? static_cast<I*>(t.net_input.data_ptr()) : nullptr,
          .coef = static_cast<const StepCoef*>(t.coef.data_ptr()),
          .n = t.x.numel()};
}

// Calls fn(N{}, D{}, I{}) with the storage types of F, the state and the network's input.
template <typename BF16, typename F16, typename Fn>
void by_heun_storage(const HeunTensors& t, const Fn& fn) {
  const auto by_net = [](const char* name, ScalarType dtype, const auto& then) {
    if (dtype == ScalarType::Float) return then(float{});
    if (dtype == ScalarType::Double) return then(double{});
    if (dtype == ScalarType::BFloat16) return then(BF16{});
    if (dtype == ScalarType::Half) return then(F16{});
    STD_TORCH_CHECK(false, "heun_step: ", name, " must be float32, float64, bfloat16 or float16");
  };
  by_net("F", t.F.scalar_type(), [&](auto net) {
    by_net("net_dtype", t.input_dtype, [&](auto input) {
      if (t.x.scalar_type() == ScalarType::Float) return fn(net, float{}, input);
      if (t.x.scalar_type() == ScalarType::Double) return fn(net, double{}, input);
      STD_TORCH_CHECK(false, "heun_step: x must be float32 or float64");
    });
  });
}

}  // namespace tdkern
