// Products of two tensors that are both computed: the second one becomes a weight whose blocks are all there.
#include <numeric>

#include "../linear.h"
#include "ops.h"
#include "strided.h"

namespace sparsekd {

namespace {

// Every block of a weight [k, c] in blocks of 16 x 1.
struct AllBlocks {
  AllBlocks(int64_t k, int64_t c) {
    const int64_t rows = (k + kStripRows - 1) / kStripRows;
    for (int64_t row = 0; row <= rows; ++row) row_ptr.push_back(static_cast<int32_t>(row * c));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < c; ++column) col_idx.push_back(static_cast<int32_t>(column));
  }
  std::vector<int32_t> row_ptr, col_idx;
};

constexpr int64_t kMost = 1 << 26;  // elements of the second operand

// values [k / 16][c][16] of a matrix whose element (column c, row k) lies at c * c_step + k * k_step.
void pack(const float* b, int64_t c, int64_t k, int64_t c_step, int64_t k_step, float* values) {
  for (int64_t first = 0; first < k; first += kStripRows)
    for (int64_t column = 0; column < c; ++column, values += kStripRows)
      for (int64_t lane = 0; lane < kStripRows; ++lane)
        values[lane] = first + lane < k ? b[column * c_step + (first + lane) * k_step] : 0.0f;
}

// [..., m, c] x [..., c, k], or with `transposed` x [..., k, c]: outer sizes are the same, or those of one are missing.
void matmul(Compiler& compiler, const Node& node) {
  expect_counts(node, 2, 1);
  const bool transposed = node.attributes.at("transposed").boolean();
  const int a = compiler.of(node.inputs[0], Layout::kRowMajor), b = compiler.of(node.inputs[1], Layout::kRowMajor);
  const Operand first = compiler.operand(a), second = compiler.operand(b);
  const int rank = first.shape.rank, outer = second.shape.rank - 2;
  expect(first.dtype == DType::kFloat32 && second.dtype == DType::kFloat32, "it takes float32");
  expect(rank >= 2 && (outer == 0 || outer == rank - 2),
         "it multiplies " + to_string(first.shape) + " and " + to_string(second.shape) + ", of unlike dimensions");
  const int64_t c = first.shape.at(rank - 1), k = second.shape.at(outer + (transposed ? 0 : 1));
  const int64_t other = second.shape.at(outer + (transposed ? 1 : 0)), m = first.shape.at(rank - 2);
  expect(c > 0 && other == c && k > 0 && (m > 0 || outer == 0),
         "it multiplies " + to_string(first.shape) + " and " + to_string(second.shape) + ", which do not fit");
  for (int i = 0; i < outer; ++i)
    expect(first.shape.at(i) == second.shape.at(i), "its operands have other outer sizes");
  expect(outer > 0 || !second.shape.batched(), "its second operand follows the batch alone");
  expect(k <= kMost / c - kStripRows, "its second operand is too large");
  Shape shape = first.shape;
  shape.dims[static_cast<size_t>(rank - 1)] = k;
  const int y = compiler.fresh(DType::kFloat32, shape);
  const auto blocks = std::make_shared<AllBlocks>(k, c);
  compiler.step({a, b}, {y}, [=](const Frame& frame) {
    const int64_t all = first.shape.elements() * (first.shape.batched() ? frame.n : 1) / c;  // rows of the first
    const int64_t items = outer == 0 ? 1 : all / m, rows = items == 0 ? 0 : all / items;
    const int64_t size = (k + kStripRows - 1) / kStripRows * kStripRows * c;
    const auto one = [&](int64_t item, int threads) {
      thread_local std::vector<float> packed;
      packed.resize(static_cast<size_t>(size));
      float* const values = packed.data();
      pack(frame.address<const float>(b) + item * c * k, c, k, transposed ? 1 : k, transposed ? c : 1, values);
      conv2d<float>(linear_shape(rows, c, k, kStripRows, 1), {frame.address<const float>(a) + item * rows * c, true},
                    values,
                    {blocks->row_ptr.data(), blocks->col_idx.data(), static_cast<int64_t>(blocks->col_idx.size())},
                    {nullptr, nullptr, Activation::kNone}, {frame.address<float>(y) + item * rows * k, true}, threads);
    };
    if (rows == 0) return;
    if (items < frame.threads)
      for (int64_t item = 0; item < items; ++item) one(item, frame.threads);
    else
      parallel(frame.threads, items, [&](int64_t item) { one(item, 1); });
  });
  compiler.give(node.outputs[0], y);
}

}  // namespace

void add_products(OpTable& table) { table["matmul"] = matmul; }

}  // namespace sparsekd
