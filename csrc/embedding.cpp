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
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(ids[i]) >= rows;
  for (int64_t i = 0; outside; ++i)
    if (static_cast<uint64_t>(ids[i]) >= rows)
      throw std::out_of_range("sparsekd.embedding: ids must lie in [0, " + std::to_string(table.rows) + "), got " +
                              std::to_string(ids[i]) + " at place " + std::to_string(i));
}

}  // namespace

template <class T>
void embedding(const EmbeddingLookup<T>& args) {
  check_ids(args.table, args.ids, args.count);
  const EmbeddingKernels& table = kernels().embedding;
  if constexpr (std::is_same_v<T, float>)
    table.lookup_f32(args);
  else if constexpr (std::is_same_v<T, Bfloat16>)
    table.lookup_bf16(args);
  else
    table.lookup_f16(args);
}

template void embedding(const EmbeddingLookup<float>&);
template void embedding(const EmbeddingLookup<Bfloat16>&);
template void embedding(const EmbeddingLookup<Float16>&);

template <class T>
void embedding_bag(const EmbeddingBag<T>& args) {
  if (args.bags > 0) check_ids(args.table, args.ids, args.offsets[args.bags]);
  const EmbeddingKernels& table = kernels().embedding;
  if constexpr (std::is_same_v<T, float>)
    table.bag_f32(args);
  else if constexpr (std::is_same_v<T, Bfloat16>)
    table.bag_bf16(args);
  else
    table.bag_f16(args);
}

template void embedding_bag(const EmbeddingBag<float>&);
template void embedding_bag(const EmbeddingBag<Bfloat16>&);
template void embedding_bag(const EmbeddingBag<Float16>&);

void embedding_grad(const EmbeddingGrad& args) {
  check_ids(args.table, args.ids, args.count);
  kernels().embedding.grad(args);
}

void embedding_absent(const EmbeddingAbsent& args) {
  check_ids(args.table, args.ids, args.count);
  kernels().embedding.absent(args);
}

void embedding_top_k(const EmbeddingTopK& args) { kernels().embedding.top_k(args); }

}  // namespace sparsekd
