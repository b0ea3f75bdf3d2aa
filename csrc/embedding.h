// Embeddings as the bindings see them: a table and ids in, checked ids to a kernel call out.
#pragma once

#include "embedding_kernels.h"

namespace sparsekd {

// All throw std::out_of_range, which Python sees as IndexError, for ids that are no row of the table and for places that
// are none of its entries. T: float, Bfloat16, Float16 or int8_t.
template <class T>
void embedding(const EmbeddingLookup<T>& args);
template <class T>
void embedding_bag(const EmbeddingBag<T>& args);
template <class T>
void embedding_top_k(const EmbeddingTopK<T>& args);
void embedding_grad(const EmbeddingGrad& args);
void embedding_rows_grad(const EmbeddingRowsGrad& args);
void embedding_absent(const EmbeddingAbsent& args);

enum class EmbeddingOptimizer { kSgd, kAdagrad, kAdagradRows, kAdam };
void embedding_update(EmbeddingOptimizer optimizer, const EmbeddingUpdate& args);

void embedding_magnitudes(const EmbeddingMagnitudes& args);
void embedding_thin(const EmbeddingThin& args);
void embedding_repack(const EmbeddingRepack& args);

}  // namespace sparsekd
