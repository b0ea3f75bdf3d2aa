// Steps that move elements and compute nothing.
#pragma once

#include <array>

#include "compiler.h"

namespace sparsekd {

// The axes of a tensor from the outermost in memory.
std::array<int, kMaxRank> axes_in_memory(int rank, bool last);

// The step that copies an operand into one of the same shape and type in another layout.
void copy_operand(Compiler& compiler, int from, int to);

}  // namespace sparsekd
