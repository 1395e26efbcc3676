// Rows of tensors in chunks over the threads.
#pragma once

#include "tensor_lists.h"

namespace tdkern {

// Elements of a chunk: few, since a core prefetches better from two or three streams at a time than
// from many.
constexpr int64_t kListChunk = 512;
constexpr int64_t kListGrain = 32768;  // elements worth a thread; a row counts as whole chunks

// fn(row, begin, count): elements [begin, begin + count) of a row.
template <typename Fn>
void each_list_chunk(const TensorLists& lists, const Fn& fn) {
  std::vector<int64_t> first = {0};  // the chunk that a row starts with
  first.reserve(lists.rows.size() + 1);
  for (const auto& row : lists.rows)
    first.push_back(first.back() + (row.numel + kListChunk - 1) / kListChunk);
  if (first.back() == 0) return;
  torch::stable::parallel_for(
      0, first.back(), kListGrain / kListChunk, [&](int64_t begin, int64_t end) {
        size_t row = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t task = begin; task < end; ++task) {
          while (task >= first[row + 1]) ++row;
          const int64_t at = (task - first[row]) * kListChunk;
          fn(row, at, std::min(lists.rows[row].numel - at, kListChunk));
        }
      });
}

}  // namespace tdkern
