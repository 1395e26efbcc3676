// Lists of tensors that one launch works through: tensors that belong together (a parameter, its
// averages) as flat memory.
#pragma once

#include <utility>
#include <vector>

#include "overlap.h"

namespace tdkern {

// Rows of `columns` tensors of equal shape, behind which a row may hold `tail` more pointers.
// Column 0 is only read. A row whose tensors do not lie alike in memory goes through contiguous
// copies, which `finish` writes back.
class TensorLists {
 public:
  struct Row {
    int64_t numel;
    ScalarType first, last;  // storage of the first column and of the last
  };
  const int64_t columns, width;
  std::vector<Row> rows;
  std::vector<void*> pointers;  // [rows, width]

  TensorLists(int64_t columns, size_t count, int64_t tail = 0)
      : columns(columns), width(columns + tail) {
    rows.reserve(count);
    pointers.reserve(count * width);
    spans_.reserve(count * width);
  }

  void* const* row(size_t i) const { return pointers.data() + i * width; }

  // The row of `columns` tensors, whose shapes and devices are checked here; the caller adds its
  // tail to `pointers`.
  void add(const char* op, const Tensor* const* tensors) {
    const Tensor& first = *tensors[0];
    bool alike = columns > 1 || is_dense(first);
    for (int64_t c = 1; c < columns; ++c) {
      STD_TORCH_CHECK(same_sizes(*tensors[c], first), op,
                      ": tensors that belong together must have one shape");
      STD_TORCH_CHECK(tensors[c]->device() == first.device(), op,
                      ": tensors that belong together must be on one device");
      alike = alike && same_memory(first, *tensors[c]);
    }
    for (int64_t c = 0; c < columns; ++c)
      spans_.push_back(span_of(*tensors[c], rows.size(), c > 0, alike || is_dense(*tensors[c])));
    rows.push_back({first.numel(), first.scalar_type(), tensors[columns - 1]->scalar_type()});
    for (int64_t c = 0; c < columns; ++c) {
      if (!alike) copies_.emplace_back(*tensors[c], torch::stable::contiguous(*tensors[c]));
      pointers.push_back(alike ? tensors[c]->data_ptr() : copies_.back().second.data_ptr());
    }
  }

  // What belongs to the last row and is written besides: its tail.
  void add_tail(const Tensor& tensor) {
    spans_.push_back(span_of(tensor, rows.size() - 1, true, true));
    pointers.push_back(tensor.data_ptr());
  }

  // Throws where written memory overlaps: called before anything is written.
  void refuse_overlap(const char* op) const { tdkern::refuse_overlap(op, spans_); }

  void finish() {
    int64_t c = 0;
    for (auto& [tensor, copy] : copies_)
      if (c++ % columns != 0 && tensor.data_ptr() != copy.data_ptr())
        torch::stable::copy_(tensor, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<Span> spans_;
};

inline Tensor list_decays(const char* op, const Tensor& decays) {  // float64, where they are
  STD_TORCH_CHECK(decays.dim() == 1 && (decays.scalar_type() == ScalarType::Double ||
                                        decays.scalar_type() == ScalarType::Float),
                  op, ": decays must be float32 or float64 of shape [K]");
  return torch::stable::contiguous(decays.scalar_type() == ScalarType::Double
                                       ? decays
                                       : torch::stable::to(decays, ScalarType::Double));
}

}  // namespace tdkern
