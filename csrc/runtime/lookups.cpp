// Rows of tables by their ids, bags of them, and the places of the largest numbers.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "../dispatch.h"
#include "../embedding.h"
#include "../strips.h"
#include "moves.h"
#include "ops.h"
#include "strided.h"

namespace sparsekd {

namespace {

constexpr int64_t kNoPadding = -1;

// Ids as an operand of int64 and how many there are for one sample.
int ids_of(Compiler& compiler, int value) {
  const int given = compiler.of(value, Layout::kRowMajor);
  const Operand ids = compiler.operand(given);
  if (ids.dtype == DType::kInt64) return given;
  expect(ids.dtype == DType::kInt32, std::string("its ids have to be int64 or int32, got ") + name_of(ids.dtype));
  const int wide = compiler.fresh(DType::kInt64, ids.shape);
  compiler.step({given}, {wide}, [=](const Frame& frame) {
    const int64_t count = ids.shape.elements() * (ids.shape.batched() ? frame.n : 1);
    std::copy_n(frame.address<const int32_t>(given), count, frame.address<int64_t>(wide));
  });
  return wide;
}

void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= rows)
      throw std::out_of_range("ids must lie in [0, " + std::to_string(rows) + "), got " + std::to_string(ids[i]) +
                              " at place " + std::to_string(i));
}

// A table of which every row keeps some dimensions (../embedding_kernels.h); where rows begin follows from `kept`.
struct SparseRows {
  EmbeddingTable table{};
  const float* values = nullptr;
  std::vector<int64_t> base;
  std::vector<uint8_t> counts;
};

std::shared_ptr<const SparseRows> sparse_rows(Compiler& compiler, const Json& attributes) {
  const StoredTensor& kept = compiler.tensor(attributes.at("kept").string());
  const StoredTensor& values = compiler.tensor(attributes.at("table").string());
  const int64_t dim = attributes.at("dim").integer(1, 1 << 24), words = (dim + 63) / 64;
  expect(kept.dtype == DType::kInt64 && kept.shape.rank == 2 && kept.shape.at(0) > 0 && kept.shape.at(1) == words,
         "its kept entries are no int64 [rows, " + std::to_string(words) + "]");
  const auto rows = std::make_shared<SparseRows>();
  const int64_t count = kept.shape.at(0), groups = (count + kRowsOfBase - 1) / kRowsOfBase;
  rows->table = {.rows = count,
                 .dim = dim,
                 .kept = reinterpret_cast<const uint64_t*>(kept.data),
                 .base = nullptr,
                 .counts = nullptr};
  rows->counts.assign(static_cast<size_t>(groups * kRowsOfBase), 0);
  int64_t before = 0;
  for (int64_t row = 0; row < count; ++row) {
    if (row % kRowsOfBase == 0) rows->base.push_back(before);
    int64_t own = 0;
    for (int64_t word = 0; word < words; ++word) {
      const uint64_t bits = rows->table.kept[row * words + word];
      own += std::popcount(bits);
      expect(word + 1 < words || dim % 64 == 0 || bits >> (dim % 64) == 0, "a row keeps a dimension beyond its last");
    }
    rows->counts[static_cast<size_t>(row)] = static_cast<uint8_t>(std::min<int64_t>(own, 255));
    before += own;
  }
  expect(values.dtype == DType::kFloat32 && values.shape == shape_of({before}),
         "its table is not the " + std::to_string(before) + " float32 values that its rows keep");
  rows->values = reinterpret_cast<const float*>(values.data);
  rows->table.base = rows->base.data();
  rows->table.counts = rows->counts.data();
  compiler.keep_file();
  return rows;
}

const StoredTensor& dense_rows(Compiler& compiler, const Json& attributes) {
  const StoredTensor& table = compiler.tensor(attributes.at("table").string());
  expect_float(table.dtype);
  expect(table.shape.rank == 2 && table.shape.at(0) > 0 && table.shape.at(1) > 0, "its table is no [rows, dim]");
  compiler.keep_file();
  return table;
}

// [..., dim] of ids [...].
void embedding_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int ids = ids_of(compiler, node.inputs[0]);
  const Shape given = compiler.operand(ids).shape;
  expect(given.rank < kMaxRank, "its ids have too many dimensions");
  Shape shape = given;
  int64_t& dim = shape.dims[static_cast<size_t>(shape.rank++)];
  if (node.attributes.find("kept") != nullptr) {
    const auto rows = sparse_rows(compiler, node.attributes);
    dim = rows->table.dim;
    const int y = compiler.fresh(DType::kFloat32, shape);
    compiler.step({ids}, {y}, [=](const Frame& frame) {
      const int64_t count = given.elements() * (given.batched() ? frame.n : 1);
      embedding<float>({.table = rows->table,
                        .values = rows->values,
                        .row_scale = nullptr,
                        .ids = frame.address<const int64_t>(ids),
                        .count = count,
                        .out = frame.address<float>(y),
                        .threads = frame.threads});
    });
    return compiler.give(node.outputs[0], y);
  }
  const StoredTensor& table = dense_rows(compiler, node.attributes);
  dim = table.shape.at(1);
  const int y = compiler.fresh(table.dtype, shape);
  const int64_t rows = table.shape.at(0), bytes = dim * size_of(table.dtype);
  compiler.step({ids}, {y}, [=, data = table.data](const Frame& frame) {
    const int64_t count = given.elements() * (given.batched() ? frame.n : 1);
    const int64_t* const id = frame.address<const int64_t>(ids);
    check_ids(id, count, rows);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(frame.at[y] + i * bytes, data + id[i] * bytes, static_cast<size_t>(bytes));
  });
  compiler.give(node.outputs[0], y);
}

enum class Mode { kSum, kMean, kMax };

Mode mode_of(const Json& attributes) {
  const std::string& mode = attributes.at("mode").string();
  if (mode == "sum") return Mode::kSum;
  if (mode == "mean") return Mode::kMean;
  expect(mode == "max", "its mode is '" + mode + "'; known are sum, mean and max");
  return Mode::kMax;
}

// One bag of `length` ids; ids of `padding` are left out.
void dense_bag(const float* table, int64_t dim, const int64_t* ids, int64_t length, Mode mode, int64_t padding,
               float* y) {
  int64_t met = 0;
  std::fill_n(y, dim, 0.0f);
  for (int64_t i = 0; i < length; ++i) {
    if (ids[i] == padding) continue;
    const float* const row = table + ids[i] * dim;
    for (int64_t j = 0; j < dim; ++j)
      y[j] = mode == Mode::kMax ? (met == 0 || row[j] > y[j] || row[j] != row[j] ? row[j] : y[j]) : y[j] + row[j];
    ++met;
  }
  if (mode == Mode::kMean && met > 0)
    for (int64_t j = 0; j < dim; ++j) y[j] /= static_cast<float>(met);
}

// [bags, dim] of ids [bags, length].
void bag_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int ids = ids_of(compiler, node.inputs[0]);
  const Shape given = compiler.operand(ids).shape;
  expect(given.rank == 2 && given.at(1) > 0, "it takes ids [bags, length], got " + to_string(given));
  const Mode mode = mode_of(node.attributes);
  const int64_t length = given.at(1);
  const int64_t padding = node.attributes.at("padding").integer(kNoPadding, kMostElements);
  const bool sparse = node.attributes.find("kept") != nullptr;
  const auto rows = sparse ? sparse_rows(compiler, node.attributes) : nullptr;
  const StoredTensor* const table = sparse ? nullptr : &dense_rows(compiler, node.attributes);
  expect(sparse ? mode != Mode::kMax : table->dtype == DType::kFloat32,
         "it takes float32 tables, and of sparse ones sums and means");
  const int64_t dim = sparse ? rows->table.dim : table->shape.at(1);
  const int y = compiler.fresh(DType::kFloat32, shape_of({given.at(0), dim}));
  const int64_t bags_of_one = std::abs(given.at(0));
  const int64_t count = sparse ? 0 : table->shape.at(0);
  const float* const data = sparse ? nullptr : reinterpret_cast<const float*>(table->data);
  compiler.step({ids}, {y}, [=](const Frame& frame) {
    const int64_t bags = bags_of_one * (given.batched() ? frame.n : 1);
    const int64_t* const id = frame.address<const int64_t>(ids);
    float* const out = frame.address<float>(y);
    if (!sparse) {
      check_ids(id, bags * length, count);
      return parallel(bags * length * dim < 1 << 15 ? 1 : frame.threads, bags, [&](int64_t bag) {
        dense_bag(data, dim, id + bag * length, length, mode, padding, out + bag * dim);
      });
    }
    std::vector<int64_t> offsets(static_cast<size_t>(bags) + 1);
    for (int64_t bag = 0; bag <= bags; ++bag) offsets[static_cast<size_t>(bag)] = bag * length;
    std::vector<float> scale;
    for (int64_t bag = 0; mode == Mode::kMean && bag < bags; ++bag) {
      const auto met = length - std::count(id + bag * length, id + (bag + 1) * length, padding);
      scale.insert(scale.end(), static_cast<size_t>(length), 1.0f / static_cast<float>(std::max<int64_t>(met, 1)));
    }
    embedding_bag<float>({.table = rows->table,
                          .values = rows->values,
                          .row_scale = nullptr,
                          .ids = id,
                          .offsets = offsets.data(),
                          .scale = scale.empty() ? nullptr : scale.data(),
                          .bags = bags,
                          .padding = padding,
                          .out = out,
                          .threads = frame.threads});
  });
  compiler.give(node.outputs[0], y);
}

// NaN is the largest number, as in torch; of equals the one that stands first.
template <class T>
void largest(const T* x, int64_t count, int64_t k, T* values, int64_t* places) {
  thread_local std::vector<int64_t> order;
  order.resize(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [x](int64_t a, int64_t b) {
    const float first = to_float(x[a]), second = to_float(x[b]);
    const bool first_nan = first != first, second_nan = second != second;
    if (first_nan != second_nan) return first_nan;
    return !first_nan && first != second ? first > second : a < b;
  });
  for (int64_t i = 0; i < k; ++i) {
    places[i] = order[static_cast<size_t>(i)];
    values[i] = x[places[i]];
  }
}

// The k largest along the last axis, the largest first: values and places.
void top_k_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 2);
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const int64_t count = from.shape.rank ? from.shape.at(from.shape.rank - 1) : 0;
  expect(count > 0, "it takes [..., numbers], got " + to_string(from.shape));
  const int64_t k = node.attributes.at("k").integer(1, count);
  Shape shape = from.shape;
  shape.dims[static_cast<size_t>(shape.rank - 1)] = k;
  const int values = compiler.fresh(from.dtype, shape), places = compiler.fresh(DType::kInt64, shape);
  compiler.step({x}, {values, places}, [=](const Frame& frame) {
    const int64_t rows = from.shape.elements() / count * (from.shape.batched() ? frame.n : 1);
    parallel(rows * count < 1 << 13 ? 1 : frame.threads, rows, [&](int64_t row) {
      int64_t* const place = frame.address<int64_t>(places) + row * k;
      if (from.dtype == DType::kFloat32)
        largest(frame.address<const float>(x) + row * count, count, k, frame.address<float>(values) + row * k, place);
      else
        largest(frame.address<const Bfloat16>(x) + row * count, count, k, frame.address<Bfloat16>(values) + row * k,
                place);
    });
  });
  compiler.give(node.outputs[0], values);
  compiler.give(node.outputs[1], places);
}

}  // namespace

void add_lookups(OpTable& table) {
  table["embedding"] = embedding_node;
  table["embedding_bag"] = bag_node;
  table["top_k"] = top_k_node;
}

}  // namespace sparsekd
