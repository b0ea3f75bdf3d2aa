// Which instruction set runs. Compiled with the flags of the oldest supported CPU.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace sparsekd {

// Instruction sets that this binary holds and this CPU runs, best first.
std::vector<std::string> available_isas();

// The table in use: SPARSEKD_CPU_ISA if set, else the best. Throws std::runtime_error naming what the CPU offers when
// the variable asks for something else.
const KernelTable& kernels();

// Uses another table from now on; throws like kernels().
void use_isa(const std::string& name);

// The OpenMP library in this process and its thread limit, or why there is none.
std::string openmp_name();

}  // namespace sparsekd
