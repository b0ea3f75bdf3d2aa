#include "weights.h"

#include <numeric>

#include "ops.h"

namespace sparsekd {

void expect_tensor(const StoredTensor& tensor, DType dtype, const Shape& shape, const char* what) {
  expect(tensor.dtype == dtype && tensor.shape == shape, std::string("its ") + what + " is " + name_of(tensor.dtype) +
                                                             " " + to_string(tensor.shape) + ", expected " +
                                                             name_of(dtype) + " " + to_string(shape));
}

namespace {

constexpr int64_t kMostColumns = 1 << 26;  // of a weight, for which memory is taken whether blocks are there or not

// The weight as a matrix [k, taps * columns], in blocks of bh x bw.
struct Matrix {
  int64_t k, columns, taps;
};

void check_blocks(const Weights& weights, const Matrix& matrix) {
  const int64_t rows = (matrix.k + weights.bh - 1) / weights.bh;
  const int64_t columns = matrix.taps * ((matrix.columns + weights.bw - 1) / weights.bw);
  const Blocks& blocks = weights.blocks;
  expect(columns <= kMostColumns / weights.bw, "its weight has too many columns");
  expect(blocks.row_ptr[0] == 0 && blocks.row_ptr[rows] == blocks.nnzb, "its row_ptr does not span its blocks");
  for (int64_t row = 0; row < rows; ++row) {
    expect(blocks.row_ptr[row] <= blocks.row_ptr[row + 1] && blocks.row_ptr[row + 1] <= blocks.nnzb,
           "its row_ptr does not rise");
    for (int32_t i = blocks.row_ptr[row]; i < blocks.row_ptr[row + 1]; ++i)
      expect(blocks.col_idx[i] >= 0 && blocks.col_idx[i] < columns &&
                 (i == blocks.row_ptr[row] || blocks.col_idx[i - 1] < blocks.col_idx[i]),
             "its col_idx does not rise within a row, or leaves the weight");
  }
}

template <class T>
void copy_dense(const T* weight, const Matrix& matrix, Weights& weights) {
  const int64_t row_blocks = (matrix.k + weights.bh - 1) / weights.bh;
  const int64_t column_blocks = (matrix.columns + weights.bw - 1) / weights.bw, of_row = matrix.taps * column_blocks;
  expect(row_blocks * of_row < INT32_MAX, "its weight is too large");
  weights.dense.assign(static_cast<size_t>(row_blocks * of_row * weights.bh * weights.bw) * sizeof(T), 0);
  T* value = reinterpret_cast<T*>(weights.dense.data());
  for (int64_t i = 0; i < row_blocks; ++i) {
    weights.row_ptr.push_back(static_cast<int32_t>(i * of_row));
    for (int64_t j = 0; j < of_row; ++j) {
      weights.col_idx.push_back(static_cast<int32_t>(j));
      const int64_t tap = j / column_blocks, first = j % column_blocks * weights.bw;
      for (int64_t r = i * weights.bh; r < (i + 1) * weights.bh; ++r)
        for (int64_t c = first; c < first + weights.bw; ++c, ++value)
          if (r < matrix.k && c < matrix.columns) *value = weight[(r * matrix.columns + c) * matrix.taps + tap];
    }
  }
  weights.row_ptr.push_back(static_cast<int32_t>(row_blocks * of_row));
  weights.blocks = {weights.row_ptr.data(), weights.col_idx.data(), row_blocks * of_row};
}

void read_dense(const StoredTensor& weight, const Matrix& matrix, int64_t rows_of_group, Weights& weights) {
  weights.bh = std::gcd(rows_of_group, int64_t{kStripRows});
  if (rows_of_group == matrix.k) weights.bh = kStripRows;
  weights.bw = weight.dtype == DType::kBfloat16 ? 2 : 1;
  if (weight.dtype == DType::kFloat32)
    copy_dense(reinterpret_cast<const float*>(weight.data), matrix, weights);
  else
    copy_dense(reinterpret_cast<const Bfloat16*>(weight.data), matrix, weights);
}

void read_blocks(Compiler& compiler, const Json& attributes, const Matrix& matrix, Weights& weights) {
  const auto& block = attributes.at("block").array();
  expect(block.size() == 2, "its block has no two sizes");
  weights.bh = block[0].integer(1, 1 << 16);
  weights.bw = block[1].integer(1, 1 << 16);
  const StoredTensor& row_ptr = compiler.tensor(attributes.at("row_ptr").string());
  const StoredTensor& col_idx = compiler.tensor(attributes.at("col_idx").string());
  const StoredTensor& values = *weights.values;
  expect(values.shape.rank == 3 && values.shape.at(0) < INT32_MAX, "its values have no three dimensions");
  expect_tensor(values, values.dtype, shape_of({values.shape.at(0), weights.bh, weights.bw}), "values");
  expect_tensor(row_ptr, DType::kInt32, shape_of({(matrix.k + weights.bh - 1) / weights.bh + 1}), "row_ptr");
  expect_tensor(col_idx, DType::kInt32, shape_of({values.shape.at(0)}), "col_idx");
  weights.blocks = {reinterpret_cast<const int32_t*>(row_ptr.data), reinterpret_cast<const int32_t*>(col_idx.data),
                    values.shape.at(0)};
  check_blocks(weights, matrix);
}

}  // namespace

Weights read_weights(Compiler& compiler, const Node& node, DType dtype, const Shape& shape, int64_t groups) {
  const Json& attributes = node.attributes;
  const Matrix matrix{shape.at(0), shape.at(1), shape.rank == 4 ? shape.at(2) * shape.at(3) : 1};
  const bool bytes = attributes.find("scale") != nullptr;
  Weights weights;
  weights.values = &compiler.tensor(attributes.at("weight").string());
  expect(weights.values->dtype == (bytes ? DType::kInt8 : dtype),
         std::string("its weight is ") + name_of(weights.values->dtype) + " and its input " + name_of(dtype));
  if (attributes.find("block") != nullptr) {
    read_blocks(compiler, attributes, matrix, weights);
  } else {
    expect(!bytes, "a weight of bytes has to be block-sparse");
    expect_tensor(*weights.values, dtype, shape, "weight");
    read_dense(*weights.values, matrix, shape.at(0) / groups, weights);
  }
  if (const Json* const bias = attributes.find("bias")) {
    weights.bias = &compiler.tensor(bias->string());
    expect_tensor(*weights.bias, DType::kFloat32, shape_of({matrix.k}), "bias");
  }
  if (bytes) {
    const StoredTensor& scale = compiler.tensor(attributes.at("scale").string());
    expect_tensor(scale, DType::kFloat32, shape_of({matrix.k}), "scale");
    weights.scale = reinterpret_cast<const float*>(scale.data);
    constexpr int64_t kMostTerms = INT32_MAX / (255 * 127);  // that 32 bits are sure to hold
    for (int64_t i = 0; (i + 1) * weights.bh < matrix.k + weights.bh; ++i)
      expect((weights.blocks.row_ptr[i + 1] - weights.blocks.row_ptr[i]) * weights.bw <= kMostTerms,
             "an output of it sums more products of bytes than 32 bits hold");
  }
  return weights;
}

}  // namespace sparsekd
