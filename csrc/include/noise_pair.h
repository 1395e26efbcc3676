// noise_pair's arguments, checked and seen as rows: what the CPU's and CUDA's launchers share.
#pragma once

#include <tuple>
#include <type_traits>

#include "checks.h"
#include "noise_pair_math.h"

namespace tdkern {

struct Column {  // one float64 a sample
  const double* data;
  int64_t stride;
  TDKERN_HD double operator[](int64_t b) const { return data[b * stride]; }
};

// D: storage of the data. Logical element k of a sample lies at k % plane * step + k / plane.
template <typename D>
struct PairRows {
  using T = std::conditional_t<std::is_same_v<D, double>, double, float>;  // arithmetic
  Rows<const D> x0;
  Rows<D> x_t, x_tp;
  Column alpha, sigma, alpha_p, sigma_p;
  int64_t seed, offset;
  int64_t first_sample;                // index of x0's first sample, whose noise is its own
  const int64_t *seed_at, *offset_at;  // where the seed and the offset are instead, if not null
  int64_t batch, n, plane, step;
  bool shared;

  TDKERN_HD PairSample<T> sample(int64_t b) const {
    return make_pair_sample<T>(alpha[b], sigma[b], alpha_p[b], sigma_p[b], shared);
  }
  TDKERN_HD uint64_t key() const { return static_cast<uint64_t>(seed_at ? *seed_at : seed); }
  // The sample's word of Philox's counter.
  TDKERN_HD uint32_t word(int64_t b) const { return static_cast<uint32_t>(first_sample + b); }
  TDKERN_HD uint64_t counter() const {
    return static_cast<uint64_t>(offset_at ? *offset_at : offset);
  }
};

// The channels of a layout that keeps them last, 1 for a contiguous one, 0 for any other.
inline int64_t channels_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return 1;
  if (tensor.dim() < 3) return 0;
  int64_t expected = tensor.size(1);
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != expected) return 0;
    expected *= tensor.size(d);
  }
  return tensor.stride(1) == 1 && (tensor.size(0) == 1 || tensor.stride(0) == expected)
             ? tensor.size(1)
             : 0;
}

// An empty tensor in x0's own layout if its channels come first or last, else contiguous (_empty in
// ops/noise_pair.py).
inline Tensor empty_pair_like(const Tensor& x0, ScalarType dtype) {
  Tensor own = empty_like(x0, dtype);
  return channels_of(own) > 0 ? own : torch::stable::new_empty(x0, x0.sizes(), dtype);
}

inline Column column(const char* name, const Tensor& values, const Tensor& x0) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == x0.size(0) &&
                      values.scalar_type() == ScalarType::Double && values.device() == x0.device(),
                  "noise_pair: ", name, " must be float64 of shape [B] on x0's device");
  return {static_cast<const double*>(values.data_ptr()), values.stride(0)};
}

inline const int64_t* integer(const char* name,
                              const std::optional<Tensor>& value,
                              const Tensor& x0) {
  if (!value) return nullptr;
  STD_TORCH_CHECK(value->dim() == 1 && value->size(0) == 1 &&
                      value->scalar_type() == ScalarType::Long && value->device() == x0.device(),
                  "noise_pair: ", name, " must be int64 of shape [1] on x0's device");
  return static_cast<const int64_t*>(value->data_ptr());
}

using PairTensors = std::tuple<Tensor, Tensor>;  // x_t, x_tp

// Checks everything, makes the outputs and, where there is anything to compute, calls compute(rows)
// with their storage type.
template <typename BF16, typename F16, typename Compute>
PairTensors noise_pair_with(const Tensor& x0,
                            const Tensor& alpha,
                            const Tensor& sigma,
                            const Tensor& alpha_p,
                            const Tensor& sigma_p,
                            bool shared,
                            int64_t seed,
                            const std::optional<Tensor>& seed_at,
                            int64_t offset,
                            const std::optional<Tensor>& offset_at,
                            int64_t first_sample,
                            const Compute& compute) {
  STD_TORCH_CHECK(x0.dim() >= 1, "noise_pair: x0 must have shape [B, ...]");
  const ScalarType data = x0.scalar_type();
  const int64_t batch = x0.size(0), n = elements_per_sample(x0);
  STD_TORCH_CHECK(0 <= first_sample && first_sample <= (int64_t{1} << 32) - batch,
                  "noise_pair: first_sample must be in [0, 2^32 - B]");
  STD_TORCH_CHECK(batch <= int64_t{1} << 32 && n <= int64_t{1} << 34,
                  "noise_pair: x0 must have at most 2^32 samples of 2^34 elements");
  const Tensor x_t = empty_pair_like(x0, data), x_tp = empty_like(x_t, data);
  const Tensor from = as_rows(x0, x_t);
  const int64_t channels = channels_of(x_t);
  by_storage<BF16, F16>("noise_pair", data, data, [&](auto, auto data) {
    using D = decltype(data);
    const PairRows<D> view = {.x0 = rows<const D>(from),
                              .x_t = rows<D>(x_t),
                              .x_tp = rows<D>(x_tp),
                              .alpha = column("alpha", alpha, x0),
                              .sigma = column("sigma", sigma, x0),
                              .alpha_p = column("alpha_p", alpha_p, x0),
                              .sigma_p = column("sigma_p", sigma_p, x0),
                              .seed = seed,
                              .offset = offset,
                              .first_sample = first_sample,
                              .seed_at = integer("seed", seed_at, x0),
                              .offset_at = integer("offset", offset_at, x0),
                              .batch = batch,
                              .n = n,
                              .plane = std::max<int64_t>(1, n / channels),
                              .step = channels,
                              .shared = shared};
    if (batch * n > 0) compute(view);
  });
  return {x_t, x_tp};
}

}  // namespace tdkern
