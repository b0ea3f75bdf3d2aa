#include "embedding.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "dispatch.h"

namespace sparsekd {

namespace {

// The kernels follow ids blindly, so that one past the end would be answered with a neighbour's row.
void check_ids(const EmbeddingTable& table, const int64_t* ids, int64_t count) {
  const uint64_t rows = static_cast<uint64_t>(table.rows);
  uint64_t outside = 0;  // the upper bit: a comparison would not be vectorised
  for (int64_t i = 0; i < count; ++i)
    outside |= static_cast<uint64_t>(ids[i]) | (rows - 1 - static_cast<uint64_t>(ids[i]));
  for (int64_t i = 0; outside >> 63 != 0; ++i)
    if (static_cast<uint64_t>(ids[i]) >= rows)
      throw std::out_of_range("sparsekd.embedding: ids must lie in [0, " + std::to_string(table.rows) + "), got " +
                              std::to_string(ids[i]) + " at place " + std::to_string(i));
}

std::string first_of(const int64_t* numbers, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count && i < 8; ++i) text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
  return text + "]" + (count > 8 ? " and more" : "");
}

// Scores are taken of all dimensions that a row names, the queries having those of the table alone.
void check_dimensions(const EmbeddingTable& table) {
  const int64_t words = (table.dim + 63) / 64;
  if (table.dim % 64 == 0) return;
  const uint64_t beyond = ~uint64_t{0} << table.dim % 64;
  for (int64_t row = 0; row < table.rows; ++row)
    if (table.kept[(row + 1) * words - 1] & beyond)
      throw std::invalid_argument("sparsekd.embedding_top_k: kept names dimensions beyond the " +
                                  std::to_string(table.dim) + " of the queries in row " + std::to_string(row));
}

// Steps that go astray would write to memory of others; steps out of order would divide a row between two workers.
void check_places(const EmbeddingUpdate& args) {
  int64_t before = -1;
  for (int64_t i = 0; i < args.count; before = args.places[i++])
    if (args.places[i] <= before || args.places[i] >= args.num_values)
      throw std::out_of_range("sparsekd.optim: places must ascend in [0, " + std::to_string(args.num_values) +
                              "), got " + std::to_string(args.places[i]) + " behind " + std::to_string(before));
}

// The kernel of a table of T.
template <class T, class F, class B, class H, class I>
auto of_type(F f32, B bf16, H f16, I i8) {
  if constexpr (std::is_same_v<T, float>)
    return f32;
  else if constexpr (std::is_same_v<T, Bfloat16>)
    return bf16;
  else if constexpr (std::is_same_v<T, Float16>)
    return f16;
  else
    return i8;
}

}  // namespace

void check_offsets(const int64_t* offsets, int64_t bags, int64_t count) {
  bool wrong = bags < 0 || offsets[0] != 0 || offsets[bags] != count;
  for (int64_t bag = 0; bag < bags; ++bag) wrong |= offsets[bag + 1] < offsets[bag];
  if (wrong)
    throw std::invalid_argument("sparsekd.embedding_bag: offsets must rise from 0 to the number of ids, " +
                                std::to_string(count) + ", got " + first_of(offsets, bags + 1));
}

void embedding_bag_scale(const EmbeddingBagScale& args) {
  check_offsets(args.offsets, args.bags, args.count);
  for (int64_t bag = 0; bag < args.bags; ++bag) {
    const int64_t begin = args.offsets[bag], end = args.offsets[bag + 1];
    int64_t counted = 0;
    for (int64_t i = begin; i < end; ++i) counted += args.ids[i] != args.padding;
    const float share = 1.0f / static_cast<float>(counted > 0 ? counted : 1);
    for (int64_t i = begin; i < end; ++i) args.scale[i] = share;
  }
}

template <class T>
void embedding(const EmbeddingLookup<T>& args) {
  check_ids(args.table, args.ids, args.count);
  const EmbeddingKernels& table = kernels().embedding;
  of_type<T>(table.lookup_f32, table.lookup_bf16, table.lookup_f16, table.lookup_i8)(args);
}

template void embedding(const EmbeddingLookup<float>&);
template void embedding(const EmbeddingLookup<Bfloat16>&);
template void embedding(const EmbeddingLookup<Float16>&);
template void embedding(const EmbeddingLookup<int8_t>&);

template <class T>
void embedding_bag(const EmbeddingBag<T>& args) {
  if (args.bags > 0) check_ids(args.table, args.ids, args.offsets[args.bags]);
  const EmbeddingKernels& table = kernels().embedding;
  of_type<T>(table.bag_f32, table.bag_bf16, table.bag_f16, table.bag_i8)(args);
}

template void embedding_bag(const EmbeddingBag<float>&);
template void embedding_bag(const EmbeddingBag<Bfloat16>&);
template void embedding_bag(const EmbeddingBag<Float16>&);
template void embedding_bag(const EmbeddingBag<int8_t>&);

template <class T>
void embedding_top_k(const EmbeddingTopK<T>& args) {
  check_dimensions(args.table);
  const EmbeddingKernels& table = kernels().embedding;
  of_type<T>(table.top_k_f32, table.top_k_bf16, table.top_k_f16, table.top_k_i8)(args);
}

template void embedding_top_k(const EmbeddingTopK<float>&);
template void embedding_top_k(const EmbeddingTopK<Bfloat16>&);
template void embedding_top_k(const EmbeddingTopK<Float16>&);
template void embedding_top_k(const EmbeddingTopK<int8_t>&);

void embedding_grad(const EmbeddingGrad& args) {
  check_ids(args.table, args.ids, args.count);
  kernels().embedding.grad(args);
}

void embedding_rows_grad(const EmbeddingRowsGrad& args) {
  check_ids(args.table, args.rows, args.count);
  kernels().embedding.rows_grad(args);
}

void embedding_absent(const EmbeddingAbsent& args) {
  check_ids(args.table, args.ids, args.count);
  kernels().embedding.absent(args);
}

void embedding_update(EmbeddingOptimizer optimizer, const EmbeddingUpdate& args) {
  check_places(args);
  const EmbeddingKernels& table = kernels().embedding;
  switch (optimizer) {
    case EmbeddingOptimizer::kSgd:
      return table.sgd(args);
    case EmbeddingOptimizer::kAdagrad:
      return table.adagrad(args);
    case EmbeddingOptimizer::kAdagradRows:
      return table.adagrad_rows(args);
    case EmbeddingOptimizer::kAdam:
      return table.adam(args);
  }
}

void embedding_magnitudes(const EmbeddingMagnitudes& args) { kernels().embedding.magnitudes(args); }
void embedding_thin(const EmbeddingThin& args) { kernels().embedding.thin(args); }
void embedding_repack(const EmbeddingRepack& args) { kernels().embedding.repack(args); }

}  // namespace sparsekd
