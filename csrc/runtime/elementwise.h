// Activations as steps of their own.
#pragma once

#include <string>

#include "compiler.h"

namespace sparsekd {

bool knows_activation(const std::string& name);

// Adds the step and returns its operand.
int activated(Compiler& compiler, const std::string& name, int x);

}  // namespace sparsekd
