// What a graph may hold: for each name of a node (docs/file-format.md) the function that compiles it.
#pragma once

#include <map>
#include <string>

#include "compiler.h"

namespace sparsekd {

using OpTable = std::map<std::string, void (*)(Compiler&, const Node&), std::less<>>;

const OpTable& ops();

// One function each, in layers.cpp, elementwise.cpp, moves.cpp, reduce.cpp, products.cpp and lookups.cpp.
void add_layers(OpTable& table);
void add_elementwise(OpTable& table);
void add_moves(OpTable& table);
void add_reductions(OpTable& table);
void add_products(OpTable& table);
void add_lookups(OpTable& table);

// What the functions ask of their node. All throw FormatError.
void expect(bool right, const std::string& message);
void expect_counts(const Node& node, size_t inputs, size_t outputs);
void expect_float(DType dtype);           // float32 or bfloat16
int axis_of(const Json& axis, int rank);  // -1: the last one

}  // namespace sparsekd
