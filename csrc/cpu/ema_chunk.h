// The averages of a chunk of one parameter: of ema_update_, and of adam_ema_ behind its step.
#pragma once

#include "tensor_lists.h"
#include "vec.h"

namespace tdkern {

// row[0]: the parameter; row[1 + k]: its average k. Defined in ema_update.cpp.
TDKERN_EACH_ISA(template <typename N, typename D> void ema_chunk(
                    void* const* row, const double* decays, int64_t K, int64_t begin, int64_t n);)

using EmaChunk = void (*)(void* const*, const double*, int64_t, int64_t, int64_t);

// The kernel of each row.
inline std::vector<EmaChunk> ema_chunks(const char* op, const TensorLists& lists) {
  std::vector<EmaChunk> chunks;
  for (const auto& row : lists.rows)
    by_storage<BFloat16, Half>(op, row.first, row.last, [&](auto param, auto average) {
      chunks.push_back(TDKERN_PICK(ema_chunk<decltype(param), decltype(average)>));
    });
  return chunks;
}

}  // namespace tdkern
