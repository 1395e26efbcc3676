// Written memory that lies in two tensors, or twice in one: in-place ops refuse it before they
// write anything, as torch's own do.
#pragma once

#include <utility>
#include <vector>

#include "checks.h"

namespace tdkern {

// Whether the elements fill one stretch of memory, their dimensions in any order.
inline bool is_dense(const Tensor& tensor) {
  const int64_t n = tensor.numel();
  for (int64_t reach = 1; reach < n;) {
    int64_t size = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d)
      if (tensor.size(d) > 1 && tensor.stride(d) == reach) size = tensor.size(d);
    if (size == 0) return false;
    reach *= size;
  }
  return true;
}

// Whether two tensors of one shape keep the same element at every place of their memory.
inline bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return is_dense(a);
}

// The bytes from a tensor's first element to behind its last.
struct Span {
  uintptr_t begin, end;
  const Tensor* tensor;
  size_t row;  // tensors of one row belong together, element by element
  bool written, dense;
};

inline Span span_of(const Tensor& tensor, size_t row, bool written, bool dense) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  int64_t elements = tensor.numel();
  if (!dense && elements > 0) {
    elements = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return {.begin = begin,
          .end = begin + elements * tensor.element_size(),
          .tensor = &tensor,
          .row = row,
          .written = written,
          .dense = dense};
}

// The first byte of every element, in ascending order. As large as the tensor: only for what is not
// dense.
inline std::vector<uintptr_t> places(const Tensor& tensor) {
  std::vector<uintptr_t> at = {reinterpret_cast<uintptr_t>(tensor.data_ptr())};
  at.reserve(tensor.numel());
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const size_t count = at.size();
    for (int64_t i = 1; i < tensor.size(d); ++i)
      for (size_t j = 0; j < count; ++j)
        at.push_back(at[j] + i * tensor.stride(d) * tensor.element_size());
  }
  std::sort(at.begin(), at.end());
  return at;
}

inline bool overlaps_itself(const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) == 0) return true;
  const std::vector<uintptr_t> at = places(tensor);
  return std::adjacent_find(at.begin(), at.end()) != at.end();
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const std::vector<uintptr_t> in_a = places(a), in_b = places(b);
  for (size_t i = 0, j = 0; i < in_a.size() && j < in_b.size();) {
    if (in_a[i] + a.element_size() <= in_b[j]) {
      ++i;
    } else if (in_b[j] + b.element_size() <= in_a[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

// Whether two tensors whose spans meet may be in one call: neither is written, or they meet in no
// element, or what is written is, element by element, what is read there.
inline bool may_meet(const Span& a, const Span& b) {
  if (!a.written && !b.written) return true;
  const bool same = a.row == b.row && a.begin == b.begin &&
                    a.tensor->scalar_type() == b.tensor->scalar_type() &&
                    same_sizes(*a.tensor, *b.tensor) && same_memory(*a.tensor, *b.tensor);
  if (same && a.written != b.written) return true;
  return !(a.dense && b.dense) && !overlap(*a.tensor, *b.tensor);
}

// Throws where a tensor that is written overlaps itself or another tensor.
inline void refuse_overlap(const char* op, const std::vector<Span>& spans) {
  std::vector<std::pair<uintptr_t, uint32_t>> order;  // by where they begin
  order.reserve(spans.size());
  for (size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    if (span.begin == span.end) continue;
    STD_TORCH_CHECK(!span.written || span.dense || !overlaps_itself(*span.tensor), op,
                    ": a tensor that is written overlaps itself");
    order.emplace_back(span.begin, static_cast<uint32_t>(i));
  }
  std::sort(order.begin(), order.end());
  std::vector<const Span*> open;  // those that reach into what comes next
  for (const auto& [begin, i] : order) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [begin = begin](const Span* other) { return other->end <= begin; }),
               open.end());
    for (const Span* other : open)
      STD_TORCH_CHECK(may_meet(*other, spans[i]), op,
                      ": a tensor that is written overlaps another tensor");
    open.push_back(&spans[i]);
  }
}

}  // namespace tdkern
