// A list of tensors in one launch: their pointers travel in the kernel's arguments, which a CUDA
// graph keeps; one block per chunk of a tensor.
#pragma once

#include "launch.cuh"
#include "tensor_lists.h"
#include "vec.cuh"

static_assert(CUDART_VERSION >= 12010,
              "tdkern needs nvcc 12.1 or later, whose kernels take 32 KB of arguments");

namespace tdkern {

constexpr int64_t kListChunk = 8192;  // elements of a block

struct TensorTable {
  static constexpr int kTensors = 768, kPointers = 2816;
  void* pointers[kPointers];  // [tensors, columns]: a row of TensorLists with its tail
  int64_t numel[kTensors];
  int first[kTensors +
            1];  // the block that a tensor starts with; behind the last tensor, the count of blocks
  int tensors, columns;
};

// This block's tensor, and of that the elements [begin, begin + count).
struct TableChunk {
  void* const* row;
  int64_t begin;
  int tensor, count;
};

__device__ __forceinline__ TableChunk table_chunk(const TensorTable& table) {
  const int block = blockIdx.x;
  int low = 0, high = table.tensors;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = (block - table.first[low]) * kListChunk;
  const int64_t left = table.numel[low] - begin;
  return {table.pointers + low * table.columns, begin, low,
          static_cast<int>(left < kListChunk ? left : kListChunk)};
}

// Calls launch(row of its storage, table) for tables that together hold every row, each of one
// storage; the blocks of one may be 0.
template <typename Launch>
void each_table(const TensorLists& lists, const Launch& launch) {
  std::vector<bool> done(lists.rows.size());
  TensorTable table;
  table.columns = static_cast<int>(lists.width);
  for (size_t start = 0; start < lists.rows.size(); ++start) {
    const TensorLists::Row& kind = lists.rows[start];
    if (done[start]) continue;
    table.tensors = table.first[0] = 0;
    for (size_t i = start; i < lists.rows.size(); ++i) {
      const TensorLists::Row& row = lists.rows[i];
      if (done[i] || row.first != kind.first || row.last != kind.last) continue;
      done[i] = true;
      if (table.tensors == TensorTable::kTensors ||
          (table.tensors + 1) * table.columns > TensorTable::kPointers) {
        launch(kind, table);
        table.tensors = 0;
      }
      std::copy_n(lists.row(i), lists.width, table.pointers + table.tensors * table.columns);
      table.numel[table.tensors] = row.numel;
      table.first[table.tensors + 1] =
          table.first[table.tensors] + static_cast<int>((row.numel + kListChunk - 1) / kListChunk);
      ++table.tensors;
    }
    if (table.tensors > 0) launch(kind, table);
  }
}

__device__ __forceinline__ bool packs_start(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace tdkern
