#include "ops.h"

namespace sparsekd {

const OpTable& ops() {
  static const OpTable table = [] {
    OpTable table;
    add_layers(table);
    add_elementwise(table);
    add_moves(table);
    add_reductions(table);
    add_products(table);
    add_lookups(table);
    return table;
  }();
  return table;
}

void expect(bool right, const std::string& message) {
  if (!right) throw FormatError(message);
}

void expect_counts(const Node& node, size_t inputs, size_t outputs) {
  expect(node.inputs.size() == inputs && node.outputs.size() == outputs,
         "it takes " + std::to_string(inputs) + " operands and makes " + std::to_string(outputs) + ", got " +
             std::to_string(node.inputs.size()) + " and " + std::to_string(node.outputs.size()));
}

void expect_float(DType dtype) {
  expect(dtype == DType::kFloat32 || dtype == DType::kBfloat16,
         std::string("it takes float32 and bfloat16, got ") + name_of(dtype));
}

int axis_of(const Json& axis, int rank) {
  const int64_t given = axis.integer(-rank, rank - 1);
  return static_cast<int>(given < 0 ? given + rank : given);
}

}  // namespace sparsekd
