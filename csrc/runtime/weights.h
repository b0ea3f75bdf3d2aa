// Weights of layers as a file has them, dense or as blocks, checked and brought into blocks.
#pragma once

#include <string>
#include <vector>

#include "../conv2d.h"
#include "compiler.h"

namespace sparsekd {

// The tensors of a layer; blocks are in `index` where the file has a dense weight.
struct Weights {
  const StoredTensor* values = nullptr;
  const StoredTensor* bias = nullptr;
  const float* scale = nullptr;  // of int8: of every output
  Blocks blocks{};
  int64_t bh = 0, bw = 0;
  std::vector<int32_t> row_ptr, col_idx;
  std::vector<char> dense;  // values of a dense weight, in blocks

  const char* data() const { return dense.empty() ? values->data : dense.data(); }
};

// dtype: of the input. shape: of a dense weight, whose first size is k.
Weights read_weights(Compiler& compiler, const Node& node, DType dtype, const Shape& shape, int64_t groups);

void expect_tensor(const StoredTensor& tensor, DType dtype, const Shape& shape, const char* what);

}  // namespace sparsekd
