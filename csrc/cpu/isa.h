// Which instruction sets this processor, its kernel and this build have. Levels are ordered: each has all before it.
#pragma once

#include <vector>

namespace pefast {

enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };

const char* isa_name(Isa level);

// every level that can run here, the least first
const std::vector<Isa>& isa_levels();

// the level that kernels use: the highest that can run here, unless use_isa named a lower one
Isa isa();

// "" means the highest; throws std::invalid_argument for a level that this machine or this build lacks
void use_isa(const char* name);

}  // namespace pefast
