// A frozen weight in the order in which AMX reads it: strips of 32 columns, for each step of 32 in the sum two tiles
// of 16 columns, in a tile 16 pairs of neighbouring terms for each column. Edges are filled with zeros.
#pragma once

#include <cstdint>

#include "types.h"

namespace pefast {

// how many bf16 numbers a right factor [sum, columns] takes
namespace {

inline int64_t packed_size(int64_t sum, int64_t columns) {
    return (sum + 31) / 32 * 32 * ((columns + 31) / 32 * 32);
}

}  // namespace

// src [sum, columns] bf16 with any strides; asks for AMX
void pack_amx(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
              bf16* packed, int threads);

}  // namespace pefast
